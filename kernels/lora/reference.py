"""Reference of lora: mixed ranks in one batch, each at its true rank.

The rows of an adapter are next to each other, so each adapter is two small products on views. The alternative, one
product over the ranks of all adapters of the batch with those of others masked, makes every token pay for all of them:
with eight adapters it took 1.5 to 4 times as long (benchmarks/README.md).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.adapter_rows import AdapterTiles
from kernels.expert_route import Routed
from kernels.expert_tiles import ExpertTiles
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

    y [T, sum of widths], whose rows are contiguous. x [T, in], or [T, slices * in] if the site has own_inputs. tiles:
    which rows belong to which adapter. max_rank: no adapter of the batch has a higher one.
    bias [sum of widths]: what the linear has added to y already; a gain must not scale it. None: the linear has none.
    Rows of adapters that have nothing for the site are left alone.
    """
    assert tiles.spans is not None, "the reference needs spans on the host"
    for start, end, slot in tiles.spans:
        adapter = adapters.by_slot.get(slot)
        if adapter is None:
            continue
        _add(y[start:end], x[start:end], site, adapter, bias)


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
    """As lora, for the (token, choice) pairs of routed experts; P of them.

    tiles: those of `routed`, cut where the adapter changes (expert_tiles).
    gathers: what gate_up of grouped_gemm has computed. x [T, in] is by token, y [P, sum of widths] by position.
    Otherwise: what down has computed. x [P, in] is by position, y [P, sum of widths] by pair number.
    max_rank: as of lora. counters: not read here. Rows of padding are left alone.
    """
    assert site.experts and not site.own_inputs
    for entry, first, count in tiles.tiles[: int(tiles.num_tiles)].tolist():
        slot, expert = divmod(entry, site.experts)
        adapter = adapters.by_slot.get(slot)
        if adapter is None:
            continue
        own = [None if it is None else it.of_expert(expert) for it in adapter]
        pairs = routed.pairs[first : first + count]
        if gathers:
            _add(y[first : first + count], x[pairs // routed.places.shape[1]], site, own, None)
            continue
        out = y[pairs]
        _add(out, x[first : first + count], site, own, None)
        y[pairs] = out


def _add(y: Tensor, x: Tensor, site: LoraSite, adapter: Sequence[LoraWeights | None], bias: Tensor | None) -> None:
    """One adapter's products, to rows that are all its own. Slices that share A share its product."""
    inputs = x.chunk(len(site.widths), -1) if site.own_inputs else [x] * len(site.widths)
    column, shrunk, shrunk_by = 0, x, None
    for rows, width, weights in zip(inputs, site.widths, adapter, strict=True):
        if weights is not None:
            out = y[:, column : column + width]
            a, b = (weights.a, weights.b) if site.transposed else (weights.a.t(), weights.b.t())
            shared = a.data_ptr(), a.shape  # both: all matrices without elements lie at 0
            if site.own_inputs or shrunk_by != shared:
                shrunk, shrunk_by = torch.mm(rows, a), shared
            out.addmm_(shrunk, b, alpha=weights.scale)
            if weights.gain is not None and bias is None:
                out.mul_(weights.gain)
            elif weights.gain is not None and bias is not None:
                held = bias[column : column + width]
                out.copy_((out - held) * weights.gain + held)
        column += width
