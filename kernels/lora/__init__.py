"""lora: add each adapter's own low-rank product to the output of a linear, or of several computed as one.

A site is a linear, or several ("slices") that read the same input and whose outputs lie side by side in y. For each
adapter with weights a, b and scale for a slice, and the rows and columns of y that are its own:

    y[rows, columns] += scale * (x[rows] @ a.T) @ b.T
    y[rows, columns]  = gain * (y[rows, columns] - bias[columns]) + bias[columns]      only if it has a gain (DoRA)

x @ a.T is called the shrink (to the adapter's rank), the product with b.T the expand.

Running example: two slices of widths 2 and 1; row 0 is the base's, rows 1 and 2 belong to the adapter in slot 2. It has
rank 1, and weights for the first slice only: a [[1, 1]], b [[1], [0]], scale 2.

    tiles    spans [(1, 3, slot 2)], cut into tiles [[2, 1, 2]]      slot, first row, rows
    offsets  [0, 2, 3]                                               first column of each slice, and the end
    x        [[1, 0], [1, 1], [2, 1]]
    y        [[5, 5, 5], [5, 5, 5], [5, 5, 5]]   becomes   [[5, 5, 5], [9, 5, 5], [11, 5, 5]]

Row 1: x @ a.T is 2, times b.T is [2, 0], times 2 is [4, 0]. With a gain of [2, 1] and no bias it would be [18, 5, 5].

expert_lora is the same inside routed experts, with weights of its own for each expert. Its rows are (token, choice)
pairs, and its tiles, from expert_tiles, say of them which adapter and which expert they are of.
"""

from torch import Tensor

from kernels.adapter_rows import AdapterTiles
from kernels.compiled import takes
from kernels.expert_route import Routed
from kernels.expert_tiles import ExpertTiles
from kernels.host import takes as host_takes
from kernels.lora import host, reference
from kernels.lora.delta import Delta
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
    "Delta",
    "Field",
    "LoraSite",
    "LoraWeights",
    "SiteAdapters",
    "Split",
    "expert_lora",
    "lora",
    "shrunk",
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
    elif host_takes(x) and tiles.tiles is not None and adapters.table is not None:
        host.lora(y, x, site, adapters, tiles, max_rank, bias)
    else:
        reference.lora(y, x, site, adapters, tiles, max_rank, bias)


def shrunk(x: Tensor, adapters: SiteAdapters, tiles: AdapterTiles, max_rank: int) -> Tensor:
    """The shrinks alone, for a reader of y that adds the rest: z of a Delta. x as of lora, of a site whose slices read
    all of it. Where kernels compute."""
    from kernels.lora import kernel

    return kernel.shrunk(x, adapters, tiles, max_rank)


def expert_lora(
    y: Tensor,
    x: Tensor,
    site: LoraSite,
    adapters: SiteAdapters,
    routed: Routed,
    tiles: ExpertTiles,
    gathers: bool,
    max_rank: int,
    counters: Tensor | None,
) -> None:
    """See reference.py for shapes. counters int32: zero, and left zero; for Triton's kernel, which takes two
    launches where they are fewer than 1 + most tiles * slices. None: on a CPU."""
    if takes(y):
        from kernels.lora import kernel

        assert counters is not None
        kernel.expert_lora(y, x, site, adapters, routed, tiles, gathers, max_rank, counters)
    elif host_takes(x) and adapters.table is not None:
        host.expert_lora(y, x, site, adapters, routed, tiles, gathers, max_rank)
    else:
        reference.expert_lora(y, x, site, adapters, routed, tiles, gathers, max_rank, counters)
