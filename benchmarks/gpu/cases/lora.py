"""LoRA at Llama-3.1-8B's sites, and inside DeepSeek-V2-Lite's experts."""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from benchmarks.gpu.cases.case import Case, Draw
from benchmarks.gpu.cases.experts import Layer
from kernels.adapter_rows import AdapterTiles, Segment, cut, tile_rows
from kernels.expert_route import Routed, Routing, TokenBatch
from kernels.lora import LoraSite, LoraWeights, SiteAdapters, table_rows

BATCHES = ((1, 1, 16), (32, 1, 16), (32, 8, 16), (32, 8, 64), (128, 32, 16), (128, 128, 16), (512, 8, 16),
           (2048, 1, 16), (2048, 8, 16))  # tokens, adapters, highest rank; the last three are prefills  # fmt: skip


def lora(draw: Draw) -> Iterator[Case]:
    sites = LLAMA if not draw.scale.is_toy else {"qkv": (40, (24, 8, 8)), "gate_up": (40, (32, 32))}
    for name, (depth, widths) in sites.items():
        for tokens, adapters, rank in BATCHES if not draw.scale.is_toy else [(5, 3, 4)]:
            for single in (True, False):
                yield linear_case(draw, name, depth, widths, tokens, adapters, rank, single)
    yield from _expert_lora(draw)


LLAMA = {"qkv": (4096, (4096, 1024, 1024)), "gate_up": (4096, (14336, 14336))}  # depth, widths


def linear_case(
    draw: Draw, name: str, depth: int, widths: Sequence[int], tokens: int, adapters: int, rank: int, single: bool
) -> Case:
    """One site. single: in one launch, else in two."""
    from kernels.lora import kernel, reference

    ranks = [max(1, rank // (1 + index % 3)) for index in range(adapters)]  # mixed
    weight_bytes = sum(r * (depth * len(widths) + sum(widths)) for r in ranks) * draw.dtype.itemsize
    site, max_rank = LoraSite(tuple(widths)), max(16, -(-rank // 16) * 16)
    copies = [_adapters(draw, site, depth, ranks) for _ in range(draw.scale.copies(weight_bytes))]
    tiles = _tiles(draw, tokens, adapters, len(widths))
    x, y = draw.randn(tokens, depth), draw.randn(tokens, sum(widths))
    assert tiles.counters is not None

    def added(launch: Callable[..., object], *more: object) -> Tensor:
        out = y.clone()
        launch(out, x, site, copies[0], tiles, max_rank, None, *more)
        return out

    return Case(
        "lora", f"{name} {tokens} tokens, {adapters} adapters, rank <= {rank}, {'one launch' if single else 'two'}",
        draw.dtype, lambda: added(kernel.lora, single), lambda: added(reference.lora),
        [lambda it=it: kernel.lora(y, x, site, it, tiles, max_rank, None, single) for it in copies],
        weight_bytes + x.nbytes + 2 * y.nbytes, counters=(tiles.counters,),
    )  # fmt: skip


def _adapters(draw: Draw, site: LoraSite, depth: int, ranks: Sequence[int]) -> SiteAdapters:
    """ranks: of the adapters in slots 1, 2, .. (or expert places); 0 where there is none."""
    held = SiteAdapters({
        slot: [LoraWeights(draw.randn(rank, depth), draw.randn(width, rank), 0.01) for width in site.widths]
        for slot, rank in enumerate(ranks, start=1)
    })  # fmt: skip
    rows = [table_rows(site, held, slot) for slot in range(len(ranks) + 1)]
    held.table = torch.tensor(rows, dtype=torch.int64, device=draw.device)
    held.offsets = draw.ints(list(accumulate(site.widths, initial=0)))
    return held


def _tiles(draw: Draw, tokens: int, adapters: int, slices: int) -> AdapterTiles:
    slots = sorted(1 + index % adapters for index in range(tokens))
    spans = [Segment(slots.index(it), len(slots) - slots[::-1].index(it), it) for it in sorted(set(slots))]
    tiles = cut(spans, tile_rows(tokens))
    counters = draw.zeros(1 + len(tiles) * slices)
    return AdapterTiles(spans, draw.ints(tiles), draw.ints([len(tiles)]), tile_rows(tokens), counters)


def _expert_lora(draw: Draw) -> Iterator[Case]:
    """Eight adapters and the base in one batch, each adapter with a LoRA in every expert."""
    layer, size = Layer.of(draw), draw.scale.size
    adapters, rank = size(8, 2), size(16, 4)
    ranks = [0] * (layer.experts - 1) + [
        max(1, rank // (1 + it % 3)) for it in range(adapters * layer.experts)
    ]  # mixed
    sites = {True: LoraSite((layer.inner, layer.inner)), False: LoraSite((layer.hidden,))}
    held = {True: _adapters(draw, sites[True], layer.hidden, ranks),
            False: _adapters(draw, sites[False], layer.inner, ranks)}  # fmt: skip
    for tokens in (3,) if draw.scale.is_toy else (1, 32, 512):
        routed = _route_all(draw, tokens, layer, adapters)
        for gathers, site in sites.items():
            yield _expert_case(draw, tokens, layer, site, held[gathers], routed, gathers, ranks, rank)


def _route_all(draw: Draw, tokens: int, layer: Layer, adapters: int) -> Routed:
    """Every expert of every adapter in a place of its own."""
    from kernels.expert_route import kernel as route
    from kernels.grouped_gemm.kernel import tile_rows as rows_for

    places = (adapters + 1) * layer.experts
    expert_map = torch.arange(places, dtype=torch.int32, device=draw.device).view(adapters + 1, layer.experts)
    chosen = draw.ints([draw.rng.randrange(adapters + 1) for _ in range(tokens)])
    logits = torch.randn(tokens, layer.experts, device=draw.device)
    batch = TokenBatch(chosen, None, draw.zeros(2))
    rows = rows_for(tokens * layer.top_k, layer.experts)
    return route.expert_route(logits, Routing(layer.top_k), expert_map, places, batch, rows)


def _expert_case(
    draw: Draw, tokens: int, layer: Layer, site: LoraSite, held: SiteAdapters, routed: Routed, gathers: bool,
    ranks: Sequence[int], rank: int,
) -> Case:  # fmt: skip
    from kernels.lora import kernel, reference

    pairs, used = tokens * layer.top_k, routed.places.unique().tolist()
    depth, out = (layer.hidden, 2 * layer.inner) if gathers else (layer.inner, layer.hidden)
    x, y = draw.randn(tokens if gathers else pairs, depth), draw.randn(pairs, out)
    width = depth * len(site.widths) + out
    weights = sum(ranks[place - 1] for place in used if place > 0) * width * x.itemsize
    counters = draw.zeros(1 + 2 * len(routed.tiles))

    def added(launch: Callable[..., object]) -> Tensor:
        to = y.clone()
        launch(to, x, site, held, routed, gathers, rank, counters)
        return to

    return Case(
        "lora", f"expert {'gate_up' if gathers else 'down'} {tokens} tokens, tile {routed.tile_rows}", draw.dtype,
        lambda: added(kernel.expert_lora), lambda: added(reference.expert_lora),
        [lambda: kernel.expert_lora(y, x, site, held, routed, gathers, rank, counters)],
        weights + x.nbytes + 2 * y.nbytes,
        counters=(counters,),
    )  # fmt: skip
