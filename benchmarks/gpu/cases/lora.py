"""LoRA at Llama-3.1-8B's sites, and inside DeepSeek-V2-Lite's experts."""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from types import ModuleType

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
    copies = [adapters_of(draw, site, depth, ranks) for _ in range(draw.scale.copies(weight_bytes))]
    tiles = tiles_of(draw, tokens, adapters, len(widths))
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


def adapters_of(draw: Draw, site: LoraSite, depth: int, ranks: Sequence[int]) -> SiteAdapters:
    """ranks: of the adapters in slots 1, 2, ..."""
    stacks = (site.experts,) if site.experts else ()
    held = SiteAdapters({
        slot: [LoraWeights(draw.randn(*stacks, rank, depth), draw.randn(*stacks, width, rank), 0.01)
               for width in site.widths]
        for slot, rank in enumerate(ranks, start=1)
    })  # fmt: skip
    rows = [table_rows(site, held, slot) for slot in range(len(ranks) + 1)]
    held.table = torch.tensor(rows, dtype=torch.int64, device=draw.device)
    held.offsets = draw.ints(list(accumulate(site.widths, initial=0)))
    return held


def tiles_of(draw: Draw, tokens: int, adapters: int, slices: int) -> AdapterTiles:
    slots = sorted(1 + index % adapters for index in range(tokens))
    spans = [Segment(slots.index(it), len(slots) - slots[::-1].index(it), it) for it in sorted(set(slots))]
    tiles = cut(spans, tile_rows(tokens))
    counters = draw.zeros(1 + len(tiles) * slices)
    return AdapterTiles(spans, draw.ints(tiles), draw.ints([len(tiles)]), tile_rows(tokens), counters)


def _expert_lora(draw: Draw) -> Iterator[Case]:
    """Eight adapters and the base in one batch, each adapter with a LoRA of its own in every expert."""
    layer, size = Layer.of(draw), draw.scale.size
    rank = size(16, 4)
    ranks = [max(1, rank // (1 + index % 3)) for index in range(size(8, 2))]  # mixed
    sites = {True: LoraSite((layer.inner, layer.inner), experts=layer.experts),
             False: LoraSite((layer.hidden,), experts=layer.experts)}  # fmt: skip
    held = {True: adapters_of(draw, sites[True], layer.hidden, ranks),
            False: adapters_of(draw, sites[False], layer.inner, ranks)}  # fmt: skip
    for tokens in (3,) if draw.scale.is_toy else (1, 32, 512, 2048):
        slots = draw.ints(sorted(draw.rng.randrange(len(ranks) + 1) for _ in range(tokens - 1)) + [len(ranks)])
        routed = _route(draw, layer, slots)
        for gathers, site in sites.items():
            yield _expert_case(draw, layer, site, held[gathers], slots, routed, gathers, ranks)


def _route(draw: Draw, layer: Layer, slots: Tensor) -> Routed:
    """None replaces an expert."""
    from kernels.expert_route import kernel as route
    from kernels.grouped_gemm.kernel import tile_rows as rows_for

    tokens, experts = len(slots), layer.experts
    expert_map = torch.arange(experts, dtype=torch.int32, device=draw.device).repeat(int(slots.max()) + 1, 1)
    batch, rows = TokenBatch(slots, None, draw.zeros(2)), rows_for(tokens * layer.top_k, experts)
    logits = torch.randn(tokens, experts, device=draw.device)
    return route.expert_route(logits, Routing(layer.top_k), expert_map, experts, batch, rows)


def _expert_case(
    draw: Draw, layer: Layer, site: LoraSite, held: SiteAdapters, slots: Tensor, routed: Routed, gathers: bool,
    ranks: Sequence[int],
) -> Case:  # fmt: skip
    """Tiles are cut anew in what is compared: their order may differ, the result may not."""
    from kernels.expert_tiles import kernel as cut_kernel
    from kernels.expert_tiles import reference as cut_reference
    from kernels.lora import kernel, reference

    tokens, pairs = len(slots), routed.pairs.numel()
    depth, out = (layer.hidden, 2 * layer.inner) if gathers else (layer.inner, layer.hidden)
    x, y = draw.randn(tokens if gathers else pairs, depth), draw.randn(pairs, out)
    if gathers:  # products that are still to be activated: float32 for the kernel, x's type for the reference
        y = y.float()
    tiles = cut_kernel.expert_tiles(routed, slots, layer.experts)
    entries = tiles.tiles[: int(tiles.num_tiles), 0].unique().tolist()
    width = depth * len(site.widths) + out
    weights = sum(ranks[entry // layer.experts - 1] for entry in entries) * width * x.itemsize
    counters = draw.zeros(1 + len(site.widths) * len(tiles.tiles))

    def added(cut: ModuleType, launch: Callable[..., object], dtype: torch.dtype) -> Tensor:
        to = y.to(dtype, copy=True)
        launch(to, x, site, held, routed, cut.expert_tiles(routed, slots, layer.experts), gathers, max(ranks), counters)
        return to

    return Case(
        "lora", f"expert {'gate_up' if gathers else 'down'} {tokens} tokens, tile {routed.tile_rows}", draw.dtype,
        lambda: added(cut_kernel, kernel.expert_lora, y.dtype),
        lambda: added(cut_reference, reference.expert_lora, x.dtype),
        [lambda: kernel.expert_lora(y, x, site, held, routed, tiles, gathers, max(ranks), counters)],
        weights + x.nbytes + 2 * y.nbytes,
        counters=(counters,),
    )  # fmt: skip
