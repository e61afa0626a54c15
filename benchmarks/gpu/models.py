"""Models of real size with adapters: decodes, prompts, both in one step, and where a replay's time goes."""

import random
from collections.abc import Iterator, Mapping, Sequence

import torch

from benchmarks.gpu import shapes
from benchmarks.gpu.engine_steps import by_overlap
from benchmarks.gpu.measure import Bench
from benchmarks.gpu.replay_table import by_kernel
from benchmarks.gpu.report import Row
from benchmarks.gpu.serving import Serving
from server.device import reserved_bytes

ESFT_ADAPTERS = 20
_SLACK = 3 << 30  # libraries' workspaces, a prompt's activations
_PAGE = 2 << 20
_FAVOUR = 32.0  # a power of two: the weights come back exactly


class Decodes:
    """Rows of decodes, each beside the base alone at the same batch."""

    def __init__(self, serving: Serving, bench: Bench, context: int) -> None:
        self._serving, self._bench, self._context = serving, bench, context
        self._base: dict[int, tuple[float, float]] = {}  # batch -> seconds, and those of the floor

    def row(self, name: str, batch: int, adapters: int) -> Row:
        """cost: what adapters take beyond the bytes that they add, ((T - T0) - (F - F0)) / T0. Where T0 is far above
        its own floor F0, T / F beside T0 / F0 would hide what they waste."""
        serving = self._serving
        plan = serving.decodes(batch, self._context, adapters)
        taken, picks = serving.time(plan), serving.picks(plan)
        floor = serving.floor_bytes(plan, picks) / self._bench.bandwidth
        base, base_floor = self._base.setdefault(batch, (taken.device, floor))
        row: Row = {
            "decode": name, "batch": batch, "device ms": taken.device * 1e3, "floor ms": floor * 1e3,
            "cost beyond floor": ((taken.device - base) - (floor - base_floor)) / base, "of base": base / taken.device,
            "wall ms": taken.wall * 1e3, "tokens/s": batch / taken.wall,
        }  # fmt: skip
        return row | ({"picks of tuned experts": picks.tuned} if serving.experts else {})

    def forget_base(self) -> None:
        """The model has changed: the next row of each batch is the base."""
        self._base.clear()


def esft(bench: Bench) -> Iterator[Row]:
    yield bench.rates()
    size = bench.scale.size
    context, tuned_count = size(1024, 9), size(6, 2)
    kv_tokens = size(256, 4) * context + size(4096, 64)
    layers, adapter_bytes = esft_sizes(bench, kv_tokens, tuned_count)
    serving = Serving("DeepSeek-V2-Lite", bench, layers, kv_cache_bytes=kv_tokens * layers * size(576 * 2, 512),
                      adapter_bytes=adapter_bytes, adapter_slots=ESFT_ADAPTERS, max_experts_per_adapter=tuned_count,
                      max_running=size(256, 2), tokens_per_step=size(2048, 6), max_model_len=size(4096, 64),
                      max_rank=0)  # fmt: skip
    yield serving.started
    rng = random.Random(1)
    tuned = {it.spec.layer: sorted(rng.sample(range(it.spec[0]), tuned_count)) for it in serving.experts}
    decodes, resident = Decodes(serving, bench, context), 0
    batches = (1, 8, 32, 128, 256) if not bench.scale.is_toy else (2,)
    for adapters in (0, 1, 4, ESFT_ADAPTERS) if not bench.scale.is_toy else (0, 2):
        serving.add_esft(adapters - resident, tuned)
        resident = adapters
        for batch in batches:
            yield decodes.row(f"{adapters} ESFT", batch, adapters)
        if adapters:
            yield _memory(bench, serving, adapters)
    yield decodes.row(f"base, {resident} resident", size(32, 2), 0)
    yield from _prompts(bench, serving, context, resident)
    yield from by_overlap(bench, serving, context, (32, 256) if not bench.scale.is_toy else (2,))
    serving.favour(tuned, _FAVOUR)
    decodes.forget_base()
    for batch in batches:
        yield decodes.row("base, router favours the tuned", batch, 0)
        yield decodes.row(f"{resident} ESFT, router favours the tuned", batch, resident)
    serving.favour(tuned, 1 / _FAVOUR)
    yield from _tables(bench, serving, context, (("base", 0), (f"{resident} ESFT", resident)))


def _tables(bench: Bench, serving: Serving, context: int, kinds: Sequence[tuple[str, int]]) -> Iterator[Row]:
    """One replay by kernel, without and with adapters."""
    batch, layers = bench.scale.size(32, 2), serving.model.config.num_hidden_layers
    for name, adapters in kinds[: bench.scale.size(2, 1)]:
        plan = serving.decodes(batch, context, adapters)
        yield from by_kernel(bench, f"{name}, batch {batch}", serving.work(plan), serving.time(plan).device, layers)


def esft_sizes(bench: Bench, kv_tokens: int, tuned: int) -> tuple[int, int]:
    """(layers, bytes of adapters) that fit this device.

    The same with virtual memory and without: a slot has room for no more experts than are tuned, so that the padding
    that stands in for virtual memory costs nothing.
    """
    _, real, toy = shapes.MODELS["DeepSeek-V2-Lite"]
    if bench.scale.is_toy:
        return toy["num_hidden_layers"], 1 << 26
    hidden, inner = real["hidden_size"], real["moe_intermediate_size"]
    expert = 3 * hidden * inner * 2
    adapters = ESFT_ADAPTERS * (tuned * expert + 2 * _PAGE)  # of a layer
    attention = 2 * hidden * (3648 + 2048 + 2 * 512 * 2048 // hidden)
    per_layer = (real["n_routed_experts"] + real["n_shared_experts"]) * expert + attention + adapters
    layers = _layers_that_fit(real, per_layer + kv_tokens * 576 * 2)
    return layers, adapters * (layers - 1)


def _layers_that_fit(real: Mapping[str, int], per_layer: int) -> int:
    """As many as the model has, or as the free memory holds: no fewer than 4."""
    free, total = torch.cuda.mem_get_info()
    fixed = 2 * real["vocab_size"] * real["hidden_size"] * 2
    room = free - reserved_bytes(total) - _SLACK - fixed
    layers = min(real["num_hidden_layers"], room // per_layer)
    if layers < 4:
        raise RuntimeError(f"{free:,} of {total:,} bytes are free: room for {layers} layers of {per_layer:,} bytes")
    return layers


def _memory(bench: Bench, serving: Serving, adapters: int) -> Row:
    """KV tokens that this device has left: adapters here, or a merged copy of the model for each."""
    info = serving.info
    per_token = info.kv_cache_bytes / info.kv_cache_tokens
    total = torch.cuda.mem_get_info()[1] * 0.9 if bench.scale.is_cuda else 0.0
    here = (total - serving.weight_bytes - serving.adapter_bytes) / per_token
    merged = (total - serving.weight_bytes * max(1, adapters)) / per_token
    return {"memory": f"{adapters} adapters", "adapter bytes": serving.adapter_bytes, "KV tokens left": int(here),
            "with merged copies": max(0, int(merged))}  # fmt: skip


def _prompts(bench: Bench, serving: Serving, context: int, adapters: int) -> Iterator[Row]:
    """Steps with prompt tokens: alone, and beside decodes. Those of up to 512 tokens are captured."""
    tokens, decodes = bench.scale.size(2048, 6), bench.scale.size(31, 1)
    kinds = (("base", 0), ("adapters", adapters))
    for label, slots in kinds:
        taken = serving.time(serving.prefill(tokens, min(1, slots)))
        share = serving.prefill_ops(tokens) / taken.device / bench.matrix_rate
        yield {"prompt": label, "tokens": tokens, "device ms": taken.device * 1e3, "wall ms": taken.wall * 1e3,
               "share of peak": share}  # fmt: skip
    for beside in (bench.scale.size(it, 3) for it in ((225, 481, 993) if not bench.scale.is_toy else (3,))):
        for label, slots in kinds:
            plan = serving.mixed(decodes, context, beside, slots)
            taken = serving.time(plan)
            yield {"mixed step": label, "decodes": decodes, "prompt tokens": beside,
                   "captured": serving.is_captured(plan), "device ms": taken.device * 1e3,
                   "wall ms": taken.wall * 1e3}  # fmt: skip


def lora(bench: Bench) -> Iterator[Row]:
    yield bench.rates()
    size = bench.scale.size
    context, batches = size(1024, 9), (1, 8, 32, 128) if not bench.scale.is_toy else (2,)
    kv_tokens = batches[-1] * context + size(4096, 64)
    _, real, toy = shapes.MODELS["Llama-3.1-8B"]
    layers = toy["num_hidden_layers"] if bench.scale.is_toy else _layers_that_fit(
        real, _llama_layer_bytes(real) + kv_tokens * 4096 + (12 << 30) // real["num_hidden_layers"]
    )  # fmt: skip
    serving = Serving("Llama-3.1-8B", bench, layers, kv_cache_bytes=kv_tokens * layers * size(4096, 512),
                      adapter_bytes=size(12 << 30, 1 << 26), adapter_slots=40, max_running=size(128, 2),
                      tokens_per_step=size(2048, 6), max_model_len=size(4096, 64),
                      max_rank=size(64, 8))  # fmt: skip
    yield serving.started
    decodes, resident = Decodes(serving, bench, context), 0
    for adapters, ranks in _LORA if not bench.scale.is_toy else ((0, ()), (1, (4,))):
        serving.add_lora(adapters - resident, ranks)
        resident = adapters
        for batch in batches:
            yield decodes.row(f"{adapters} LoRA", batch, adapters)
    yield decodes.row(f"base, {resident} resident", size(32, 2), 0)
    yield from _prompts(bench, serving, context, resident)
    yield from by_overlap(bench, serving, context, (32, 128) if not bench.scale.is_toy else (2,))
    serving.add_lora(1, (size(128, 16),))
    yield decodes.row("base", resident + 1, 0)
    yield decodes.row("one of a rank that no graph has", resident + 1, resident + 1)
    yield from _tables(bench, serving, context, (("base", 0), ("8 LoRA", 8)))


_LORA: Sequence[tuple[int, Sequence[int]]] = ((0, ()), (1, (16,)), (8, (16,)), (32, (8, 16, 32, 64)))


def _llama_layer_bytes(real: Mapping[str, int]) -> int:
    hidden = real["hidden_size"]
    return 2 * hidden * (6144 + hidden + 3 * real["intermediate_size"])
