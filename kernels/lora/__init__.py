"""lora: add each segment's own low-rank product to the output of a linear, or of several computed as one."""

from torch import Tensor

from kernels.compiled import takes
from kernels.lora import reference
from kernels.lora.site import LoraSite, LoraWeights, Segment, Segments, cut, table_row, tile_rows

__all__ = ["LoraSite", "LoraWeights", "Segment", "Segments", "cut", "lora", "table_row", "tile_rows"]


def lora(y: Tensor, x: Tensor, site: LoraSite, segments: Segments, bias: Tensor | None = None) -> None:
    """See reference.py for shapes."""
    if takes(y):
        from kernels.lora import kernel

        kernel.lora(y, x, site, segments, bias)
    else:
        reference.lora(y, x, site, segments, bias)
