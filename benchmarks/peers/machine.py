"""What the machine itself can do, against which floors are computed. By torch, on as many threads as it was given."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from benchmarks.peers.load import Load

_TIMES = 40  # short and many: beside other work some have a core to themselves


def describe() -> str:
    """Its processor's name, cores and memory."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((it.split(":", 1)[1].strip() for it in lines if it.startswith("model name")), platform.machine())
    flags = next((it for it in lines if it.startswith("flags")), "").split()
    extra = "".join(f", {it}" for it in ("avx512f", "avx512_bf16", "amx_tile") if it in flags)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{name}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB{extra}"


@cache
def read_bandwidth() -> float:
    """Bytes a second of reading memory far larger than the caches."""
    memory = torch.ones(1 << 26)  # 256 MiB
    return memory.nbytes / _fastest(memory.sum)


@cache
def flops() -> float:
    """Of a large float32 product, a second."""
    size = 1024
    left, right = torch.ones(size, size), torch.ones(size, size)
    return 2 * size**3 / _fastest(lambda: left @ right)


def _fastest(act: Callable[[], object]) -> float:
    """Seconds. The least of some, because this is to be a floor."""
    act()
    seconds = []
    for _ in range(_TIMES):
        start = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def dense_floor(load: Load, layer_parameters: int, head_parameters: int, kv_bytes: int) -> dict[str, float | str]:
    """What no system can pass with all requests at once in float32, without counting attention's products: prompts at
    the machine's FLOP/s; each step's products, or its reads of weights and KV cache, whichever take longer."""
    count = len(load.jobs)
    prompts = [len(job.prompt) for job in load.jobs]
    prefill = 2 * layer_parameters * sum(prompts) / flops()
    products = 2 * (layer_parameters + head_parameters) * count / flops()
    kv = kv_bytes * (sum(prompts) + count * load.new_tokens / 2)
    reads = (4 * (layer_parameters + head_parameters) + kv) / read_bandwidth()
    seconds = prefill + load.new_tokens * max(products, reads)
    return {"requests at once": str(count), "prompts, s": prefill, "a step's products, ms": 1e3 * products,
            "a step's reads, ms": 1e3 * reads, "tok/s at most": count * load.new_tokens / seconds,
            "GFLOP/s": flops() / 1e9, "GB/s": read_bandwidth() / 1e9,
            "prompt tokens, mean": statistics.mean(prompts)}  # fmt: skip
