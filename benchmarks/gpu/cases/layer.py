"""What a fused layer computes between its products, also where adapters add to what it reads."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.cases.case import Case, Draw, Outputs
from benchmarks.gpu.cases.lora import adapters_of, tiles_of
from kernels.adapter_rows import AdapterTiles, covering, cut
from kernels.gated import Activation
from kernels.latent_prep import LatentNorm, Pairing, Turns
from kernels.lora import LoraSite, SiteAdapters
from kernels.lora.delta import Delta
from kernels.rope_store import Heads


@dataclass(frozen=True)
class Adapted:
    """A product y of x, and what adapters add to it: already, as the reference has it, or as a delta to its reader."""

    y: Tensor
    whole: Tensor
    held: list[SiteAdapters]  # copies of the adapters, whose addresses are in their tables
    deltas: list[Delta]  # over each of them
    weight_bytes: int

    @classmethod
    def drawn(cls, draw: Draw, depth: int, widths: Sequence[int]) -> "Adapted":
        from kernels.lora import kernel, reference

        tokens, adapters, rank = (32, 8, 16) if not draw.scale.is_toy else (5, 3, 4)
        ranks, site = [max(1, rank // (1 + index % 3)) for index in range(adapters)], LoraSite(tuple(widths))
        weight_bytes = sum(ranks) * sum(widths) * draw.dtype.itemsize
        held = [adapters_of(draw, site, depth, ranks) for _ in range(draw.scale.copies(weight_bytes))]
        tiles = tiles_of(draw, tokens, adapters, len(widths))
        cover = _cover(draw, tiles, tokens)
        x, y = draw.randn(tokens, depth), draw.randn(tokens, sum(widths))
        whole = y.clone()
        reference.lora(whole, x, site, held[0], tiles, 16, None)

        def delta(it: SiteAdapters) -> Delta:
            assert it.table is not None and it.offsets is not None
            return Delta(kernel.shrunk(x, it, tiles, 16), it.table, it.offsets, cover, None)

        return cls(y, whole, held, [delta(it) for it in held], weight_bytes)

    def case(
        self, op: str, name: str, kernel: Callable[[Tensor, Delta], Outputs], reference: Callable[[Tensor], Outputs]
    ) -> Case:
        """What reads y, and as much again written."""
        counters = self.deltas[0].cover.counters
        return Case(op, f"{name}, with LoRA", self.y.dtype, lambda: kernel(self.y, self.deltas[0]),
                    lambda: reference(self.whole), [partial(kernel, self.y, it) for it in self.deltas],
                    self.weight_bytes + 2 * self.y.nbytes,
                    counters=() if counters is None else (counters,))  # fmt: skip


def _cover(draw: Draw, tiles: AdapterTiles, rows: int) -> AdapterTiles:
    assert tiles.spans is not None
    numbers = cut(covering(tiles.spans, rows), tiles.tile_rows)
    return AdapterTiles(None, draw.ints(numbers), draw.ints([len(numbers)]), tiles.tile_rows, draw.zeros(len(numbers)))


def gated(draw: Draw) -> Iterator[Case]:
    from kernels.gated import kernel, reference

    inner = draw.scale.size(14336, 32)
    for rows in draw.token_counts[:5]:
        products = draw.randn(rows, 2 * inner)
        yield Case("gated", f"{rows} rows", draw.dtype, partial(kernel.gated, products, Activation()),
                   partial(reference.gated, products, Activation()), [partial(kernel.gated, products, Activation())],
                   3 * products.nbytes // 2)  # fmt: skip
    adapted = Adapted.drawn(draw, draw.scale.size(4096, 40), (inner, inner))
    yield adapted.case("gated", f"{len(adapted.y)} rows", lambda y, it: kernel.gated(y, Activation(), False, it),
                       lambda y: reference.gated(y, Activation()))  # fmt: skip


def norm_after_lora(draw: Draw) -> Iterator[Case]:
    from kernels.rms_norm import kernel, reference

    width = draw.scale.size(4096, 32)
    adapted = Adapted.drawn(draw, draw.scale.size(14336, 40), (width,))
    residual, weight = draw.randn(*adapted.y.shape), draw.randn(width)
    yield adapted.case("rms_norm", f"{len(residual)} rows and a residual",
                       lambda y, it: kernel.add_rms_norm(y, residual, weight, 1e-6, 0.0, True, it),
                       lambda y: reference.add_rms_norm(y, residual, weight, 1e-6))  # fmt: skip


def rope_store(draw: Draw) -> Iterator[Case]:
    from kernels.rope_store import kernel, reference

    size = draw.scale.size
    heads = Heads(size(32, 4), size(8, 2), size(128, 8), size(128, 8), size(128, 8))

    def stored(function: Callable[..., Tensor], qkv: Tensor, *more: object) -> tuple[Tensor, ...]:
        turns, slots, caches = _places(draw, heads, len(qkv))
        return function(qkv, heads, *turns, *caches, slots, *more), *caches

    for rows in draw.token_counts[:5]:
        qkv = draw.randn(rows, sum(heads.widths))
        turns, slots, caches = _places(draw, heads, rows)
        yield Case("rope_store", f"{rows} tokens", draw.dtype, partial(stored, kernel.rope_store, qkv),
                   partial(stored, reference.rope_store, qkv),
                   [partial(kernel.rope_store, qkv, heads, *turns, *caches, slots)], 2 * qkv.nbytes)  # fmt: skip
    adapted = Adapted.drawn(draw, size(4096, 40), heads.widths)
    yield adapted.case("rope_store", f"{len(adapted.y)} tokens",
                       lambda y, it: stored(kernel.rope_store, y, None, it),
                       lambda y: stored(reference.rope_store, y))  # fmt: skip


def _places(draw: Draw, heads: Heads, tokens: int) -> tuple[tuple[Tensor, Tensor], Tensor, tuple[Tensor, Tensor]]:
    """Turns, KV slots and empty caches: the same for every caller."""
    blocks, size = tokens + 1, draw.scale.size(16, 4)
    angles = torch.arange(tokens * heads.rotated // 2, device=draw.device).view(1, tokens, -1) / 7
    turns = torch.cat([angles, angles], -1)
    slots = torch.arange(tokens, dtype=torch.int32, device=draw.device) * (size + 1) % (blocks * size)
    caches = torch.zeros(2, blocks, size, heads.kv, heads.dim, device=draw.device, dtype=draw.dtype)
    return (turns.cos().to(draw.dtype), turns.sin().to(draw.dtype)), slots, (caches[0], caches[1])


def latent_prep(draw: Draw) -> Iterator[Case]:
    from kernels.latent_prep import kernel, reference

    size = draw.scale.size
    heads, nope, rotary, latent, block = size(16, 2), size(128, 8), size(64, 8), size(512, 24), size(16, 4)
    for tokens in draw.token_counts[:5]:
        projected = draw.randn(tokens, heads * (nope + rotary) + latent + rotary)
        query, compressed = projected.split([heads * (nope + rotary), latent + rotary], -1)
        query = query.unflatten(-1, (heads, -1))[..., nope:]
        angles = torch.randn(tokens, rotary // 2, device=draw.device)
        turns = Turns(angles.cos(), angles.sin(), Pairing.ADJACENT)
        norm = LatentNorm(draw.randn(latent), 1e-6)
        slots = torch.randperm(tokens * block, device=draw.device, dtype=torch.int32)[:tokens]

        arguments = (query, compressed, *norm, turns)
        buffers = partial(_latent_buffers, draw, tokens, block, heads, latent + rotary, slots)
        yield Case("latent_prep", f"{tokens} tokens", draw.dtype,
                   partial(_written, kernel.latent_prep, arguments, buffers),
                   partial(_written, reference.latent_prep, arguments, buffers),
                   [partial(kernel.latent_prep, *arguments, *buffers())],
                   2 * (query.numel() + compressed.numel()) * draw.dtype.itemsize)  # fmt: skip


def _written(
    function: Callable[..., None], arguments: tuple[object, ...], buffers: Callable[[], tuple[Tensor, Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    cache, slots, absorbed = buffers()
    function(*arguments, cache, slots, absorbed)
    return cache, absorbed


def _latent_buffers(
    draw: Draw, tokens: int, block: int, heads: int, width: int, slots: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cache, KV slots and the absorbed query, as latent_prep takes them."""
    cache = torch.zeros(tokens, block, 1, width, device=draw.device, dtype=draw.dtype)
    return cache, slots, torch.zeros(tokens, heads, width, device=draw.device, dtype=draw.dtype)
