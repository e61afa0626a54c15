"""LoRA at Llama-3.1-8B's sites, and inside DeepSeek-V2-Lite's experts."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.gpu.cases.case import Case, Draw
from benchmarks.gpu.cases.experts import Layer
from kernels.expert_route import Routed, Routing, TokenBatch
from kernels.lora import LoraSite, LoraWeights, Segment, Segments, cut, tile_rows

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
    sites = [make_site(draw, depth, widths, ranks) for _ in range(draw.scale.copies(weight_bytes))]
    segments = _segments(draw, tokens, adapters, len(widths), max(16, -(-rank // 16) * 16))
    x, y = draw.randn(tokens, depth), draw.randn(tokens, sum(widths))
    assert segments.counters is not None

    def added(launch: Callable[..., object], *more: object) -> Tensor:
        out = y.clone()
        launch(out, x, sites[0], segments, None, *more)
        return out

    return Case(
        "lora", f"{name} {tokens} tokens, {adapters} adapters, rank <= {rank}, {'one launch' if single else 'two'}",
        draw.dtype, lambda: added(kernel.lora, single), lambda: added(reference.lora),
        [lambda site=site: kernel.lora(y, x, site, segments, None, single) for site in sites],
        weight_bytes + x.nbytes + 2 * y.nbytes, counters=(segments.counters,),
    )  # fmt: skip


def make_site(draw: Draw, depth: int, widths: Sequence[int], ranks: Sequence[int]) -> LoraSite:
    """ranks: of the adapters in slots 1, 2, ..; 0 where a slot has none."""
    site = LoraSite(widths)
    for slot, rank in enumerate(ranks, start=1):
        for index, width in enumerate(widths):
            site.put(slot, index, LoraWeights(draw.randn(rank, depth), draw.randn(width, rank), 0.01))
    rows = [site.rows(slot) for slot in range(len(ranks) + 1)]
    site.attach(torch.tensor(rows, dtype=torch.int64, device=draw.device))
    return site


def _segments(draw: Draw, tokens: int, adapters: int, slices: int, max_rank: int) -> Segments:
    slots = sorted(1 + index % adapters for index in range(tokens))
    spans = [Segment(slots.index(it), len(slots) - slots[::-1].index(it), it) for it in sorted(set(slots))]
    tiles = cut(spans, tile_rows(tokens))
    counters = draw.zeros(1 + len(tiles) * slices)
    return Segments(spans, draw.ints(tiles), draw.ints([len(tiles)]), tile_rows(tokens), max_rank, counters)


def _expert_lora(draw: Draw) -> Iterator[Case]:
    """Eight adapters and the base in one batch, each adapter with a LoRA in every expert."""
    layer, size = Layer.of(draw), draw.scale.size
    adapters, rank = size(8, 2), size(16, 4)
    ranks = [0] * (layer.experts - 1) + [
        max(1, rank // (1 + it % 3)) for it in range(adapters * layer.experts)
    ]  # mixed
    sites = {True: make_site(draw, layer.hidden, (layer.inner, layer.inner), ranks),
             False: make_site(draw, layer.inner, (layer.hidden,), ranks)}  # fmt: skip
    for tokens in (3,) if draw.scale.is_toy else (1, 32, 512):
        routed = _route_all(draw, tokens, layer, adapters)
        for gathers, site in sites.items():
            yield _expert_case(draw, tokens, layer, site, routed, gathers, ranks, rank)


def _route_all(draw: Draw, tokens: int, layer: Layer, adapters: int) -> Routed:
    """Every expert of every adapter in a slot of its own."""
    from kernels.expert_route import kernel as route
    from kernels.grouped_gemm.kernel import tile_rows as rows_for

    slots = (adapters + 1) * layer.experts
    expert_map = torch.arange(slots, dtype=torch.int32, device=draw.device).view(adapters + 1, layer.experts)
    chosen = draw.ints([draw.rng.randrange(adapters + 1) for _ in range(tokens)])
    logits = torch.randn(tokens, layer.experts, device=draw.device)
    batch = TokenBatch(chosen, None, draw.zeros(2))
    rows = rows_for(tokens * layer.top_k, layer.experts)
    return route.expert_route(logits, Routing(layer.top_k), expert_map, slots, batch, rows)


def _expert_case(
    draw: Draw, tokens: int, layer: Layer, site: LoraSite, routed: Routed, gathers: bool, ranks: Sequence[int],
    rank: int,
) -> Case:  # fmt: skip
    from kernels.lora import kernel, reference

    pairs, used = tokens * layer.top_k, routed.slots.unique().tolist()
    depth, out = (layer.hidden, 2 * layer.inner) if gathers else (layer.inner, layer.hidden)
    x, y = draw.randn(tokens if gathers else pairs, depth), draw.randn(pairs, out)
    width = depth * len(site.widths) + out
    weights = sum(ranks[slot - 1] for slot in used if slot > 0) * width * x.itemsize
    counters = draw.zeros(1 + 2 * len(routed.tiles))

    def added(launch: Callable[..., object]) -> Tensor:
        to = y.clone()
        launch(to, x, site, routed, gathers, rank, counters)
        return to

    return Case(
        "lora", f"expert {'gate_up' if gathers else 'down'} {tokens} tokens, tile {routed.tile_rows}", draw.dtype,
        lambda: added(kernel.expert_lora), lambda: added(reference.expert_lora),
        [lambda: kernel.expert_lora(y, x, site, routed, gathers, rank, counters)], weights + x.nbytes + 2 * y.nbytes,
        counters=(counters,),
    )  # fmt: skip
