"""One kernel at one shape: what it should give, and the least that anyone must move to get it."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.gpu.measure import Scale
from kernels.expert_route import Routed, Routing, TokenBatch
from kernels.lora import LoraSite, LoraWeights, Segment, Segments, cut, tile_rows
from kernels.sampling import Sampled

Outputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """`timed` are calls that do the same on different memory; the kernel's own where that is all.

    num_bytes and num_ops: what any implementation has to read and write, and to multiply and add.
    tolerance: of the largest element of the reference's.
    """

    op: str
    name: str
    dtype: torch.dtype
    kernel: Callable[[], Outputs]
    reference: Callable[[], Outputs]
    num_bytes: int = 0
    num_ops: int = 0
    timed: Sequence[Callable[[], object]] = ()
    exact: bool = False

    @property
    def tolerance(self) -> float:
        if self.exact:
            return 0.0
        return 2e-2 if self.dtype == torch.bfloat16 else 2e-4

    def error(self) -> float:
        """Of the kernel, relative to the largest element of the reference. Infinite where it is not finite."""
        got, want = self.kernel(), self.reference()
        pairs = zip(_as_tuple(got), _as_tuple(want), strict=True)
        return max(_error(a.double(), b.double()) for a, b in pairs)


def _as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _error(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape or not bool(got.isfinite().all()):
        return float("inf")
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-30)) if got.numel() else 0.0


class Cases:
    """All cases of a dtype. Inputs are drawn anew from `seed`."""

    def __init__(self, scale: Scale, dtype: torch.dtype, seed: int) -> None:
        self._scale, self._dtype, self._device = scale, dtype, scale.device
        self._rng = random.Random(seed)
        torch.manual_seed(seed)

    def of(self, op: str) -> Iterator[Case]:
        return getattr(self, f"_{op}")()

    def _randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=self._device, dtype=self._dtype) * scale

    def _ints(self, values: Sequence[object]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self._device)

    def _case(self, op: str, name: str, kernel: Callable[[], Outputs], reference: Callable[[], Outputs],
              num_bytes: int = 0, num_ops: int = 0, timed: Sequence[Callable[[], object]] = ()) -> Case:  # fmt: skip
        return Case(op, name, self._dtype, kernel, reference, num_bytes, num_ops, timed or (kernel,))

    # -- experts: DeepSeek-V2-Lite's layer with 20 adapters ---

    def _layer(self) -> tuple[int, int, int, int, int]:
        """hidden, intermediate, experts, choices, slots."""
        size = self._scale.size
        return size(2048, 24), size(1408, 20), size(64, 8), size(6, 2), size(64, 8) + 20 * size(8, 2)

    def _batch(self, tokens: int) -> tuple[Tensor, Tensor, TokenBatch]:
        """Logits, expert map and tokens of a mixed batch."""
        _, _, experts, _, _ = self._layer()
        tuned = self._scale.size(6, 2)
        expert_map = torch.arange(experts, dtype=torch.int32).repeat(21, 1)
        for slot in range(1, 21):
            chosen = sorted(self._rng.sample(range(experts), tuned))
            first = experts + (slot - 1) * self._scale.size(8, 2)
            expert_map[slot, chosen] = torch.arange(tuned, dtype=torch.int32) + first
        adapters = self._ints([self._rng.randrange(21) for _ in range(tokens)])
        logits = torch.randn(tokens, experts, device=self._device)
        return logits, expert_map.to(self._device), TokenBatch(adapters, None, self._ints([0, 0]))

    def _token_counts(self) -> tuple[int, ...]:
        return (3,) if self._scale.is_toy else (1, 8, 32, 128, 256, 2048)

    def _expert_route(self) -> Iterator[Case]:
        from kernels.expert_route import kernel, reference
        from kernels.grouped_gemm.kernel import tile_rows as rows_for

        *_, experts, top_k, slots = self._layer()
        for tokens in self._token_counts():
            logits, expert_map, batch = self._batch(tokens)
            rows = rows_for(tokens * top_k, experts)

            def run(function: Callable[..., Routed], logits: Tensor = logits, expert_map: Tensor = expert_map,
                    batch: TokenBatch = batch, rows: int = rows) -> tuple[Tensor, ...]:  # fmt: skip
                routed = function(logits, Routing(top_k), expert_map, slots, batch, rows)
                order = routed.slots.sort(dim=-1)  # which of a token's choices comes first is nobody's promise
                return order.values, routed.weights.gather(1, order.indices), routed.pairs, routed.num_tiles

            def launch(logits: Tensor = logits, expert_map: Tensor = expert_map, batch: TokenBatch = batch,
                       rows: int = rows) -> object:  # fmt: skip
                return kernel.expert_route(logits, Routing(top_k), expert_map, slots, batch, rows)

            num_bytes = logits.nbytes + 4 * tokens * top_k * 3
            yield self._case("expert_route", f"{tokens} tokens", lambda run=run: _by_slot(run(kernel.expert_route)),
                             lambda run=run: _by_slot(run(reference.expert_route)), num_bytes,
                             timed=[launch])  # fmt: skip

    def _grouped_gemm(self) -> Iterator[Case]:
        from kernels.expert_route import kernel as route
        from kernels.grouped_gemm import Activation, Layout, kernel, reference

        hidden, inner, experts, top_k, slots = self._layer()
        ups, downs = self._randn(slots, 2 * inner, hidden, scale=0.02), self._randn(slots, hidden, inner, scale=0.02)
        for tokens in self._token_counts():
            logits, expert_map, batch = self._batch(tokens)
            rows = kernel.tile_rows(tokens * top_k, experts)
            routed = route.expert_route(logits, Routing(top_k), expert_map, slots, batch, rows)
            x = self._randn(tokens, hidden)
            h = kernel.gate_up(x, ups, routed, Activation(), Layout())
            products = kernel.gate_up(x, ups, routed, None, Layout())
            y = kernel.down(h, downs, routed, Layout())
            used = len(routed.slots.unique())
            pairs, size = tokens * top_k, x.itemsize
            for name, function, arguments, num_bytes, num_ops in (
                ("gate_up", "gate_up", (x, ups, routed, Activation(), Layout()),
                 used * 2 * inner * hidden * size + (x.numel() + pairs * inner) * size, 4 * pairs * hidden * inner),
                ("gate_up without activation", "gate_up", (x, ups, routed, None, Layout()),
                 used * 2 * inner * hidden * size + (x.numel() + 2 * pairs * inner) * size,
                 4 * pairs * hidden * inner),
                ("activate", "activate", (products, Activation(), False, routed), 3 * pairs * inner * size, 0),
                ("down", "down", (h, downs, routed, Layout()),
                 used * inner * hidden * size + pairs * (inner + hidden) * size, 2 * pairs * hidden * inner),
                ("combine", "combine", (y, routed), (pairs + tokens) * hidden * size, 2 * pairs * hidden),
            ):  # fmt: skip
                got, want = getattr(kernel, function), getattr(reference, function)
                yield self._case("grouped_gemm", f"{name} {tokens} tokens, {used} slots in use",
                                 lambda got=got, arguments=arguments: got(*arguments),
                                 lambda want=want, arguments=arguments: want(*arguments), num_bytes,
                                 num_ops)  # fmt: skip

    # -- LoRA: Llama-3.1-8B's sites, and inside DeepSeek-V2-Lite's experts ---

    def _lora(self) -> Iterator[Case]:
        yield from self._linear_lora()
        yield from self._expert_lora()

    def _expert_lora(self) -> Iterator[Case]:
        """Eight adapters and the base in one batch, each adapter with a LoRA in every expert."""
        from kernels.expert_route import kernel as route
        from kernels.grouped_gemm.kernel import tile_rows as rows_for
        from kernels.lora import kernel, reference

        hidden, inner, experts, top_k, _ = self._layer()
        adapters, rank = self._scale.size(8, 2), self._scale.size(16, 4)
        slots = (adapters + 1) * experts
        expert_map = torch.arange(slots, dtype=torch.int32, device=self._device).view(adapters + 1, experts)
        ranks = [0] * (experts - 1) + [max(1, rank // (1 + slot % 3)) for slot in range(adapters * experts)]  # mixed
        sites = {True: self._site(hidden, (inner, inner), ranks), False: self._site(inner, (hidden,), ranks)}
        for tokens in (3,) if self._scale.is_toy else (1, 32, 512):
            chosen = self._ints([self._rng.randrange(adapters + 1) for _ in range(tokens)])
            logits = torch.randn(tokens, experts, device=self._device)
            batch, rows = TokenBatch(chosen, None, self._ints([0, 0])), rows_for(tokens * top_k, experts)
            routed = route.expert_route(logits, Routing(top_k), expert_map, slots, batch, rows)
            counters = torch.zeros(1 + 2 * len(routed.tiles), dtype=torch.int32, device=self._device)
            pairs, used = tokens * top_k, routed.slots.unique().tolist()
            for gathers, site in sites.items():
                depth, out = (hidden, 2 * inner) if gathers else (inner, hidden)
                x, y = self._randn(tokens if gathers else pairs, depth), self._randn(pairs, out)
                width = depth * len(site.widths) + out
                weights = sum(ranks[slot - 1] for slot in used if slot > 0) * width * x.itemsize

                def launch(y: Tensor = y, x: Tensor = x, site: LoraSite = site, routed: Routed = routed,
                           gathers: bool = gathers, counters: Tensor = counters) -> Tensor:  # fmt: skip
                    kernel.expert_lora(y, x, site, routed, gathers, rank, counters)
                    return y

                def wanted(y: Tensor = y, x: Tensor = x, site: LoraSite = site, routed: Routed = routed,
                           gathers: bool = gathers) -> Tensor:  # fmt: skip
                    out = y.clone()
                    reference.expert_lora(out, x, site, routed, gathers, rank, None)
                    return out

                title = f"expert {'gate_up' if gathers else 'down'} {tokens} tokens, {adapters} adapters, tile {rows}"
                yield self._case("lora", title, lambda launch=launch, y=y: launch(y.clone()), wanted,
                                 weights + x.nbytes + 2 * y.nbytes, timed=[launch])  # fmt: skip

    def _linear_lora(self) -> Iterator[Case]:
        from kernels.lora import kernel, reference

        size = self._scale.size
        depth = size(4096, 40)
        sites = {"qkv": (size(4096, 24), size(1024, 8), size(1024, 8)), "gate_up": (size(14336, 32),) * 2}
        batches = [(1, 1, 16), (32, 1, 16), (32, 8, 16), (32, 8, 64), (128, 32, 16), (128, 128, 16), (2048, 8, 16)]
        for (name, widths), (tokens, adapters, rank) in (
            (site, batch) for site in sites.items() for batch in (batches if not self._scale.is_toy else [(5, 3, 4)])
        ):
            ranks = [max(1, rank // (1 + index % 3)) for index in range(adapters)]  # mixed
            copies = [self._site(depth, widths, ranks) for _ in range(size(max(1, min(16, 256 // adapters)), 1))]
            segments = self._segments(tokens, adapters, len(widths), max(16, -(-rank // 16) * 16))
            x, y = self._randn(tokens, depth), self._randn(tokens, sum(widths))
            weights = sum(r * (depth * len(widths) + sum(widths)) for r in ranks) * x.itemsize
            num_bytes = weights + x.nbytes + 2 * y.nbytes
            for single in (True, False):

                def run(launch: Callable[..., object], site: LoraSite = copies[0], x: Tensor = x, y: Tensor = y,
                        segments: Segments = segments) -> Tensor:  # fmt: skip
                    out = y.clone()
                    launch(out, x, site, segments)
                    return out

                def by_kernel(
                    out: Tensor, x: Tensor, site: LoraSite, segments: Segments, single: bool = single
                ) -> None:
                    kernel.lora(out, x, site, segments, None, single)

                timed = [
                    lambda site=site, x=x, y=y, segments=segments, single=single:
                    kernel.lora(y, x, site, segments, None, single) for site in copies
                ]  # fmt: skip
                title = (
                    f"{name} {tokens} tokens, {adapters} adapters, rank <= {rank}, {'one launch' if single else 'two'}"
                )
                yield self._case("lora", title, lambda run=run, by_kernel=by_kernel: run(by_kernel),
                                 lambda run=run: run(reference.lora), num_bytes, timed=timed)  # fmt: skip

    def _site(self, depth: int, widths: Sequence[int], ranks: Sequence[int]) -> LoraSite:
        site = LoraSite(widths)
        for slot, rank in enumerate(ranks, start=1):
            for index, width in enumerate(widths):
                site.put(slot, index, LoraWeights(self._randn(rank, depth), self._randn(width, rank), 0.01))
        rows = [site.rows(slot) for slot in range(len(ranks) + 1)]
        site.attach(torch.tensor(rows, dtype=torch.int64, device=self._device))
        return site

    def _segments(self, tokens: int, adapters: int, slices: int, max_rank: int) -> Segments:
        slots = sorted(1 + index % adapters for index in range(tokens))
        spans = [Segment(slots.index(it), len(slots) - slots[::-1].index(it), it) for it in sorted(set(slots))]
        tiles = cut(spans, tile_rows(tokens))
        counters = torch.zeros(1 + len(tiles) * slices, dtype=torch.int32, device=self._device)
        return Segments(spans, self._ints(tiles), self._ints([len(tiles)]), tile_rows(tokens), max_rank, counters)

    # -- attention ---

    def _paged_attention(self) -> Iterator[Case]:
        size = self._scale.size
        shapes = [  # name, query heads, key heads, key dim, value dim, [(new tokens, keys)]
            ("llama decode", 32, 8, 128, 128, [(1, size(1024, 9))] * size(32, 2)),
            ("llama decode long", 32, 8, 128, 128, [(1, size(16384, 20))] * size(2, 1)),
            ("llama mixed", 32, 8, 128, 128, [(size(512, 4), size(1024, 6))] + [(1, size(700, 5))] * size(16, 1)),
            ("llama prefill", 32, 8, 128, 128, [(size(2048, 6), size(2048, 6))]),
            ("latent decode", 16, 1, 576, 512, [(1, size(1024, 9))] * size(32, 2)),
            ("latent decode long", 16, 1, 576, 512, [(1, size(16384, 20))] * size(2, 1)),
            ("latent prefill", 16, 1, 576, 512, [(size(1024, 6), size(1024, 6))]),
        ]
        for name, heads, kv_heads, dim, value_dim, sequences in shapes:
            if self._scale.is_toy:
                heads, kv_heads, dim, value_dim = 4, min(2, kv_heads), 24, (16 if dim == 576 else 24)
            yield self._attention_case(name, heads, kv_heads, dim, value_dim, sequences, name.startswith("latent"))

    def _attention_case(
        self, name: str, heads: int, kv_heads: int, dim: int, value_dim: int, sequences: list[tuple[int, int]],
        latent: bool,
    ) -> Case:  # fmt: skip
        from kernels.paged_attention import AttentionBatch
        from kernels.paged_attention.kernel import paged_attention
        from kernels.paged_attention.reference import paged_attention as wanted

        block_size = self._scale.size(16, 4)
        counts = [-(-keys // block_size) for _, keys in sequences]
        blocks = list(range(sum(counts) + 4))
        self._rng.shuffle(blocks)
        tables = [[blocks.pop() for _ in range(count)] for count in counts]
        key_cache = self._randn(sum(counts) + 4, block_size, kv_heads, dim)
        value_cache = (
            key_cache[..., :value_dim] if latent else self._randn(sum(counts) + 4, block_size, kv_heads, value_dim)
        )
        query = self._randn(sum(new for new, _ in sequences), heads, dim)
        batch = AttentionBatch([new for new, _ in sequences], [keys for _, keys in sequences], tables, block_size,
                               self._dtype)  # fmt: skip
        on_device = batch.device_form(self._device)
        scale = dim**-0.5
        per_key = kv_heads * (dim if latent else dim + value_dim) * query.itemsize
        pairs = sum(new * keys - new * (new - 1) // 2 for new, keys in sequences)
        num_bytes = sum(keys for _, keys in sequences) * per_key + query.nbytes * (dim + value_dim) // dim
        return self._case(
            "paged_attention", f"{name}, {len(sequences)} sequences of {max(keys for _, keys in sequences)}",
            lambda: paged_attention(query, key_cache, value_cache, on_device, scale, None, None, None, None),
            lambda: wanted(query, key_cache, value_cache, batch, scale), num_bytes,
            2 * pairs * heads * (dim + value_dim),
        )  # fmt: skip

    def _store_kv(self) -> Iterator[Case]:
        from kernels.store_kv import kernel, reference

        tokens, heads, dim = self._scale.size(256, 5), self._scale.size(8, 2), self._scale.size(128, 8)
        key, value = self._randn(tokens, heads, dim), self._randn(tokens, heads, dim)
        slots = torch.randperm(4 * tokens, device=self._device)[:tokens]

        def run(store: Callable[..., None]) -> tuple[Tensor, Tensor]:
            caches = torch.zeros(2, tokens, 4, heads, dim, device=self._device, dtype=self._dtype)
            store(key, value, caches[0], caches[1], slots)
            return caches[0], caches[1]

        caches = torch.zeros(2, tokens, 4, heads, dim, device=self._device, dtype=self._dtype)
        timed = [lambda: kernel.store_kv(key, value, caches[0], caches[1], slots)]
        case = self._case("store_kv", f"{tokens} tokens", lambda: run(kernel.store_kv), lambda: run(reference.store_kv),
                          4 * key.nbytes, timed=timed)  # fmt: skip
        yield replace(case, exact=True)

    # -- the rest ---

    def _rms_norm(self) -> Iterator[Case]:
        from kernels.rms_norm import kernel, reference

        for rows in self._token_counts()[:5]:
            x, residual = (self._randn(rows, self._scale.size(4096, 40)) for _ in range(2))
            weight = self._randn(x.shape[1])
            yield self._case("rms_norm", f"{rows} rows", lambda x=x, weight=weight: kernel.rms_norm(x, weight, 1e-6),
                             lambda x=x, weight=weight: reference.rms_norm(x, weight, 1e-6), 2 * x.nbytes)  # fmt: skip
            yield self._case(
                "rms_norm", f"{rows} rows and a residual",
                lambda x=x, r=residual, weight=weight: kernel.add_rms_norm(x, r, weight, 1e-6),
                lambda x=x, r=residual, weight=weight: reference.add_rms_norm(x, r, weight, 1e-6), 4 * x.nbytes,
            )  # fmt: skip

    def _rope(self) -> Iterator[Case]:
        from kernels.rope import kernel, reference

        dim = self._scale.size(128, 16)
        for tokens in self._token_counts():
            query = self._randn(1, tokens, self._scale.size(32, 4), dim).transpose(1, 2)
            key = self._randn(1, tokens, self._scale.size(8, 2), dim).transpose(1, 2)
            angle = torch.randn(1, tokens, dim // 2, device=self._device).repeat(1, 1, 2)
            cos, sin = angle.cos().to(self._dtype), angle.sin().to(self._dtype)
            yield self._case("rope", f"{tokens} tokens",
                             lambda q=query, k=key, c=cos, s=sin: kernel.rope(q, k, c, s),
                             lambda q=query, k=key, c=cos, s=sin: reference.rope(q, k, c, s),
                             2 * (query.nbytes + key.nbytes))  # fmt: skip

    def _sampling(self) -> Iterator[Case]:
        from kernels.sampling import kernel, reference

        for rows in (2,) if self._scale.is_toy else (1, 32, 256):
            logits = self._randn(rows, self._scale.size(128256, 199))

            def full(value: float, rows: int = rows) -> Tensor:
                return torch.full((rows,), value, device=self._device)

            draws = torch.rand(rows, device=self._device)
            for name, temperature, top_k, top_p in (("greedy", 0.0, 0, 1.0), ("temperature", 1.0, 0, 1.0),
                                                    ("top-k and top-p", 1.0, 50, 0.9)):  # fmt: skip
                arguments = (logits, full(temperature), full(top_k).int(), full(top_p), full(0.0), draws)

                def run(sample: Callable[..., Sampled], arguments: tuple[Tensor, ...] = arguments,
                        is_drawn: bool = name == "temperature") -> Tensor:  # fmt: skip
                    tokens = sample(*arguments).tokens
                    # among 128 thousand tokens a sum in another order moves a boundary past a draw now and then
                    return _misses(arguments[0], tokens, arguments[-1]) if is_drawn else tokens

                timed = [lambda arguments=arguments: kernel.sample(*arguments)]
                case = self._case("sampling", f"{name}, {rows} rows", lambda run=run: run(kernel.sample),
                                  lambda run=run: run(reference.sample), logits.nbytes, timed=timed)  # fmt: skip
                yield replace(case, exact=True)


def _misses(logits: Tensor, tokens: Tensor, draws: Tensor) -> Tensor:
    """1 for each row whose draw lies further than 1e-4 from its token's part of the distribution, in float64."""
    parts = logits.double().softmax(-1)
    ends = parts.cumsum(-1).gather(-1, tokens[:, None])[:, 0]
    begins = ends - parts.gather(-1, tokens[:, None])[:, 0]
    return ((draws < begins - 1e-4) | (draws > ends + 1e-4)).float()


def _by_slot(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Slots and weights as they are; pairs by the slot that they lead to, which no order of choices changes."""
    slots, weights, pairs, num_tiles = outputs
    return slots, weights, (pairs // slots.shape[1]).sort().values, num_tiles
