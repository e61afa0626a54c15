"""lora: add each adapter's own low-rank product to the output of a linear, or of several computed as one.

expert_lora: the same inside routed experts, where the rows of a tile that expert_route made share an expert place.
"""

from torch import Tensor

from kernels.adapter_rows import AdapterTiles
from kernels.compiled import takes
from kernels.expert_route import Routed
from kernels.lora import reference
from kernels.lora.site import (
    NOTHING,
    TABLE_FIELDS,
    Field,
    LoraSite,
    LoraWeights,
    SiteAdapters,
    Split,
    table_row,
    table_rows,
)

__all__ = [
    "NOTHING",
    "TABLE_FIELDS",
    "Field",
    "LoraSite",
    "LoraWeights",
    "SiteAdapters",
    "Split",
    "expert_lora",
    "lora",
    "table_row",
    "table_rows",
]


def lora(
    y: Tensor,
    x: Tensor,
    site: LoraSite,
    adapters: SiteAdapters,
    tiles: AdapterTiles,
    max_rank: int,
    bias: Tensor | None = None,
) -> None:
    """See reference.py for shapes."""
    if takes(y):
        from kernels.lora import kernel

        kernel.lora(y, x, site, adapters, tiles, max_rank, bias)
    else:
        reference.lora(y, x, site, adapters, tiles, max_rank, bias)


def expert_lora(
    y: Tensor,
    x: Tensor,
    site: LoraSite,
    adapters: SiteAdapters,
    routed: Routed,
    gathers: bool,
    max_rank: int,
    counters: Tensor,
) -> None:
    """See reference.py for shapes; counters: [1 + most tiles * slices] int32, zero; left zero."""
    if takes(y):
        from kernels.lora import kernel

        kernel.expert_lora(y, x, site, adapters, routed, gathers, max_rank, counters)
    else:
        reference.expert_lora(y, x, site, adapters, routed, gathers, max_rank, counters)
