"""What requests that decode notice while adapters are loaded from disk beside them."""

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from adapters_store.ref import AdapterRef
from adapters_store.rules import Rules
from benchmarks.gpu.measure import Bench
from benchmarks.gpu.report import Row
from benchmarks.gpu.serving import LOAD_TIMEOUT_S, Serving
from server.engine.residency import Wait


def under_load(bench: Bench) -> Iterator[Row]:
    """Time between tokens of 32 base requests: alone, and while ESFT adapters are read, mapped, copied and evicted."""
    size = bench.scale.size
    tuned = size(3, 2)
    serving = Serving("DeepSeek-V2-Lite", bench, size(0, 2), kv_cache_bytes=size(4 << 30, 1 << 22),
                      adapter_bytes=size(3 << 30, 1 << 24), adapter_slots=2, max_experts_per_adapter=tuned,
                      max_running=size(32, 2), tokens_per_step=size(512, 8), max_model_len=size(2048, 64),
                      max_rank=0)  # fmt: skip
    yield serving.started
    plan = serving.decodes(size(32, 2), size(1024, 9), 0)
    serving.assembly.runner.launch(plan).outputs()
    with tempfile.TemporaryDirectory() as folder:
        refs = [_register(serving, Path(folder) / f"adapter-{index}", tuned) for index in range(3)]
        alone = _step_times(serving, plan, size(100, 2))
        loading: list[float] = []
        loads: list[float] = []
        for ref in refs:  # the third evicts the first: there are two slots
            start = time.perf_counter()
            while isinstance(serving.residency.acquire(ref), Wait):
                loading += _step_times(serving, plan, 1)
                if time.perf_counter() - start > LOAD_TIMEOUT_S:
                    raise RuntimeError(f"{ref.name} did not load in {LOAD_TIMEOUT_S} s: {serving.residency.report()}")
            serving.residency.release(ref)
            loads.append(time.perf_counter() - start)
    adapter_bytes = serving.residency.report()[-1].bytes
    yield {"case": "decoding alone", **_spread(alone)}
    yield {"case": "while adapters load", **_spread(loading)}
    yield {"case": "one load", "bytes": adapter_bytes, "ms": statistics.median(loads) * 1e3,
           "GB/s": adapter_bytes / statistics.median(loads) / 1e9}  # fmt: skip


def _step_times(serving: Serving, plan: list[Any], steps: int) -> list[float]:
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        serving.residency.poll()
        serving.assembly.runner.launch(plan).outputs()
        times.append(time.perf_counter() - start)
    return times


def _spread(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    at = {"median ms": 0.5, "p99 ms": 0.99, "largest ms": 1.0}
    return {"steps": float(len(ordered))} | {
        name: ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1e3 for name, share in at.items()
    }


def _register(serving: Serving, directory: Path, experts: int) -> AdapterRef:
    """An ESFT adapter on disk, verified and made known as the server would."""
    directory.mkdir()
    device = serving.experts[0].stacks.down.device
    tensors: dict[str, torch.Tensor] = {}
    for module in serving.experts:
        hidden, inner = module.spec.hidden_size, module.spec.intermediate_size
        for expert in range(experts):
            prefix = f"model.layers.{module.spec.layer}.mlp.experts.{expert}"
            for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
                drawn = torch.randn(shape, dtype=torch.bfloat16, device=device) * 0.02
                tensors[f"{prefix}.{name}_proj.weight"] = drawn.cpu()
    save_file(tensors, directory / "model.safetensors")
    rules = Rules(serving.info.base, (directory.parent,))
    entry = rules.read(directory.name, str(directory))
    serving.residency.register(entry.ref, entry.package)
    return entry.ref
