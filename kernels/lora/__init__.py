"""lora: add each segment's own low-rank product to the output of a linear, or of several computed as one.

expert_lora: the same inside routed experts, where the rows of a tile that expert_route made share a slot.
"""

from torch import Tensor

from kernels.compiled import takes
from kernels.expert_route import Routed
from kernels.lora import reference
from kernels.lora.site import LoraSite, LoraWeights, Segment, Segments, Split, cut, table_row, tile_rows

__all__ = [
    "LoraSite",
    "LoraWeights",
    "Segment",
    "Segments",
    "Split",
    "cut",
    "expert_lora",
    "lora",
    "table_row",
    "tile_rows",
]


def lora(y: Tensor, x: Tensor, site: LoraSite, segments: Segments, bias: Tensor | None = None) -> None:
    """See reference.py for shapes."""
    if takes(y):
        from kernels.lora import kernel

        kernel.lora(y, x, site, segments, bias)
    else:
        reference.lora(y, x, site, segments, bias)


def expert_lora(
    y: Tensor, x: Tensor, site: LoraSite, routed: Routed, gathers: bool, max_rank: int, counters: Tensor
) -> None:
    """See reference.py for shapes; counters: [1 + most tiles * slices] int32, zero; left zero."""
    if takes(y):
        from kernels.lora import kernel

        kernel.expert_lora(y, x, site, routed, gathers, max_rank, counters)
    else:
        reference.expert_lora(y, x, site, routed, gathers, max_rank, counters)
