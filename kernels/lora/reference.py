"""Reference and CPU path of lora: mixed ranks in one batch, each at its true rank.

Segments are contiguous, so each is two small products on views. One masked product over the ranks of all live adapters
costs every token all of them; with eight adapters it measured 1.5 to 4 times as slow (benchmarks/README.md).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.adapter_rows import AdapterTiles
from kernels.expert_route import Routed
from kernels.lora.site import LoraSite, LoraWeights, SiteAdapters


def lora(
    y: Tensor,
    x: Tensor,
    site: LoraSite,
    adapters: SiteAdapters,
    tiles: AdapterTiles,
    max_rank: int,
    bias: Tensor | None = None,
) -> None:
    """Add in place: y[rows] += scale * b @ (a @ x[rows]) for each segment and slice that its adapter has weights for.

    y [T, sum of widths], whose rows are contiguous; x [T, in]. max_rank: no adapter of the batch has a higher one. bias
    is what y holds already, for gains. Rows of adapters that have nothing here are left alone.
    """
    for start, end, slot in tiles.spans:
        adapter = adapters.by_slot.get(slot)
        if adapter is None:
            continue
        _add(y[start:end], x[start:end], site, adapter, bias)


def _add(y: Tensor, x: Tensor, site: LoraSite, adapter: Sequence[LoraWeights | None], bias: Tensor | None) -> None:
    """One adapter's products, to rows that are all its own."""
    inputs = x.chunk(len(site.widths), -1) if site.own_inputs else [x] * len(site.widths)
    column = 0
    for rows, width, weights in zip(inputs, site.widths, adapter, strict=True):
        if weights is not None:
            out = y[:, column : column + width]
            a, b = (weights.a, weights.b) if site.transposed else (weights.a.t(), weights.b.t())
            out.addmm_(torch.mm(rows, a), b, alpha=weights.scale)
            if weights.gain is not None:
                part = 0 if bias is None else bias[column : column + width]
                out.copy_((out - part) * weights.gain + part)
        column += width


def expert_lora(
    y: Tensor,
    x: Tensor,
    site: LoraSite,
    adapters: SiteAdapters,
    routed: Routed,
    gathers: bool,
    max_rank: int,
    counters: Tensor | None,
) -> None:
    """As lora, for (token, choice) pairs: `adapters` is indexed by expert place, of which an adapter has many.

    gathers: x [T, in] is a token's, y [P, sum of widths] in order of position, as gate_up of grouped_gemm returns its
    products. Else x [P, in] is in order of position and y [P, sum of widths] in order of pair number, as down's.
    A gain scales all that y holds, so the experts may have no bias. Rows of padding are left alone.
    """
    assert not site.own_inputs
    for place, first, count in routed.tiles[: int(routed.num_tiles)].tolist():
        adapter = adapters.by_slot.get(place)
        if adapter is None:
            continue
        pairs = routed.pairs[first : first + count]
        rows = x[pairs // routed.places.shape[1]] if gathers else x[first : first + count]
        out = y[first : first + count] if gathers else y[pairs]
        _add(out, rows, site, adapter, None)
        if not gathers:
            y[pairs] = out
