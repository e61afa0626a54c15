"""Routing and grouped products of DeepSeek-V2-Lite's layer with 20 adapters."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.cases.case import Case, Draw
from kernels.expert_route import Routed, Routing, TokenBatch
from kernels.expert_tiles import ExpertTiles

ADAPTERS = 20


@dataclass(frozen=True)
class Layer:
    hidden: int
    inner: int
    experts: int
    top_k: int
    tuned: int  # of one adapter
    room: int  # for an adapter's

    @classmethod
    def of(cls, draw: Draw) -> "Layer":
        size = draw.scale.size
        return cls(size(2048, 24), size(1408, 20), size(64, 8), size(6, 2), size(6, 2), size(8, 2))

    @property
    def places(self) -> int:
        return self.experts + ADAPTERS * self.room


@dataclass(frozen=True)
class Mixed:
    """A batch with an adapter or none for each token, in order of slot as a step has them: what routing reads."""

    logits: Tensor
    routing: Routing
    expert_map: Tensor
    num_places: int
    tokens: TokenBatch
    tile_rows: int

    def route(self, function: Callable[..., Routed]) -> Routed:
        return function(self.logits, self.routing, self.expert_map, self.num_places, self.tokens, self.tile_rows)


def mixed_batch(draw: Draw, tokens: int) -> Mixed:
    from kernels.grouped_gemm.kernel import tile_rows

    layer = Layer.of(draw)
    expert_map = torch.arange(layer.experts, dtype=torch.int32).repeat(ADAPTERS + 1, 1)
    for slot in range(1, ADAPTERS + 1):
        chosen = sorted(draw.rng.sample(range(layer.experts), layer.tuned))
        first = layer.experts + (slot - 1) * layer.room
        expert_map[slot, chosen] = torch.arange(layer.tuned, dtype=torch.int32) + first
    adapters = draw.ints(sorted(draw.rng.randrange(ADAPTERS + 1) for _ in range(tokens)))
    logits = torch.randn(tokens, layer.experts, device=draw.device)
    return Mixed(logits, Routing(layer.top_k), expert_map.to(draw.device), layer.places,
                 TokenBatch(adapters, None, draw.zeros(2)), tile_rows(tokens * layer.top_k, layer.experts))  # fmt: skip


def expert_route(draw: Draw) -> Iterator[Case]:
    from kernels.expert_route import kernel, reference

    for tokens in draw.token_counts:
        batch = mixed_batch(draw, tokens)
        assert batch.tokens.counters is not None
        yield Case(
            "expert_route", f"{tokens} tokens", draw.dtype,
            lambda batch=batch: _by_place(batch.route(kernel.expert_route)),
            lambda batch=batch: _by_place(batch.route(reference.expert_route)),
            [lambda batch=batch: batch.route(kernel.expert_route)],
            num_bytes=batch.logits.nbytes + 4 * tokens * batch.routing.top_k * 3,
            counters=(batch.tokens.counters,),
        )  # fmt: skip


def _by_place(routed: Routed) -> tuple[Tensor, ...]:
    """Places and weights in order of place, and pairs as the tokens that they belong to: which of a token's choices
    comes first is nobody's promise."""
    order = routed.places.sort(dim=-1)
    top_k = routed.places.shape[1]
    return (
        order.values,
        routed.weights.gather(1, order.indices),
        (routed.pairs // top_k).sort().values,
        routed.num_tiles,
    )


def expert_tiles(draw: Draw) -> Iterator[Case]:
    from kernels.expert_route import kernel as route
    from kernels.expert_tiles import kernel, reference

    experts = Layer.of(draw).experts
    for tokens in draw.token_counts:
        batch = mixed_batch(draw, tokens)
        routed, slots = batch.route(route.expert_route), batch.tokens.slots
        assert slots is not None
        cut = len(reference.expert_tiles(routed, slots, experts).tiles)
        yield Case(
            "expert_tiles", f"{tokens} tokens, {int(routed.num_tiles)} tiles cut into {cut}", draw.dtype,
            lambda routed=routed, slots=slots: _in_order(kernel.expert_tiles(routed, slots, experts)),
            lambda routed=routed, slots=slots: _in_order(reference.expert_tiles(routed, slots, experts)),
            [lambda routed=routed, slots=slots: kernel.expert_tiles(routed, slots, experts)],
            num_bytes=4 * (routed.pairs.numel() + tokens + 3 * (int(routed.num_tiles) + cut)), exact=True,
        )  # fmt: skip


def _in_order(cut: ExpertTiles) -> Tensor:
    tiles = cut.tiles[: int(cut.num_tiles)]
    return tiles[tiles[:, 1].argsort()]


def grouped_gemm(draw: Draw) -> Iterator[Case]:
    layer = Layer.of(draw)
    ups = draw.randn(layer.places, 2 * layer.inner, layer.hidden, scale=0.02)
    downs = draw.randn(layer.places, layer.hidden, layer.inner, scale=0.02)
    for tokens in draw.token_counts:
        yield from _products(draw, tokens, layer, ups, downs)


def _products(draw: Draw, tokens: int, layer: Layer, ups: Tensor, downs: Tensor) -> Iterator[Case]:
    """The four kernels of a layer. Batches of other tokens are routed to other experts: they rotate."""
    from kernels.expert_route import kernel as route
    from kernels.grouped_gemm import Activation, Layout, kernel, reference

    pairs, inner, hidden = tokens * layer.top_k, layer.inner, layer.hidden
    expert_bytes = 3 * inner * hidden * ups.itemsize
    count = draw.scale.copies(min(pairs, layer.experts) * expert_bytes // 3)
    batches = [mixed_batch(draw, tokens).route(route.expert_route) for _ in range(count)]
    used = sum(len(routed.places.unique()) for routed in batches) // count
    x = draw.randn(tokens, hidden)
    h = kernel.gate_up(x, ups, batches[0], Activation(), Layout())
    products = kernel.gate_up(x, ups, batches[0], None, Layout())
    y = kernel.down(h, downs, batches[0], Layout())
    size, weights = x.itemsize, used * expert_bytes
    calls: list[tuple[str, str, Callable[[Routed], tuple[Any, ...]], int, int]] = [
        ("gate_up", "gate_up", lambda it: (x, ups, it, Activation(), Layout()),
         weights * 2 // 3 + (tokens * hidden + pairs * inner) * size, 4 * pairs * hidden * inner),
        ("gate_up without activation", "gate_up", lambda it: (x, ups, it, None, Layout()),
         weights * 2 // 3 + tokens * hidden * size + products.nbytes, 4 * pairs * hidden * inner),
        ("activate", "activate", lambda it: (products, Activation(), False, it, x.dtype),
         products.nbytes + h.nbytes, 0),
        ("down", "down", lambda it: (h, downs, it, Layout()),
         weights // 3 + pairs * (inner + hidden) * size, 2 * pairs * hidden * inner),
        ("combine", "combine", lambda it: (y, it), (pairs + tokens) * hidden * size, 2 * pairs * hidden),
    ]  # fmt: skip
    for name, function, arguments, num_bytes, num_ops in calls:
        got, want = getattr(kernel, function), getattr(reference, function)
        first = arguments(batches[0])
        yield Case(
            "grouped_gemm", f"{name} {tokens} tokens, {used} places in use", draw.dtype,
            lambda got=got, first=first: got(*first), lambda want=want, first=first: want(*first),
            [partial(got, *arguments(routed)) for routed in batches], num_bytes, num_ops,
        )  # fmt: skip
