"""Where the time of one decode goes, by kernel."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd import DeviceType

from benchmarks.gpu.measure import Bench
from benchmarks.gpu.report import Row

_SHOWN = 24


def by_kernel(bench: Bench, name: str, work: Callable[[], object], device_seconds: float, layers: int) -> Iterator[Row]:
    """device_seconds: of the same work without a profiler; what kernels do not fill of it lies between them.

    Last in a section: a profiler that was attached slows what follows. Without a GPU the host's work stands in.
    """
    is_cuda = bench.scale.is_cuda
    activity = torch.profiler.ProfilerActivity.CUDA if is_cuda else torch.profiler.ProfilerActivity.CPU
    with torch.inference_mode(), torch.profiler.profile(activities=[activity]) as profile:
        work()
        if is_cuda:
            torch.cuda.synchronize()

    def microseconds(event: Any) -> float:
        return float(event.self_device_time_total or (0.0 if is_cuda else event.self_cpu_time_total))

    where = DeviceType.CUDA if is_cuda else DeviceType.CPU
    kernels = sorted((it for it in profile.key_averages() if it.device_type == where), key=microseconds, reverse=True)
    total, launches = sum(map(microseconds, kernels)), sum(it.count for it in kernels)
    row: Row = {"replay": name} | ({} if is_cuda else {"skipped": "kernels need a GPU; this is the host's work"})
    yield row | {"launches": launches, "a layer": launches / layers, "kernels us": total,
                 "replay us": device_seconds * 1e6, "share in kernels": total / (device_seconds * 1e6)}  # fmt: skip
    for it in kernels[: _SHOWN if is_cuda else 1]:
        yield row | {"kernel": it.key[:60], "count": it.count, "us": microseconds(it),
                     "us each": microseconds(it) / it.count, "share": microseconds(it) / total}  # fmt: skip
