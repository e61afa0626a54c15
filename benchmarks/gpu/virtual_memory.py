"""Whether adapters' memory can come and go a page at a time on this device; first of all, since sizes depend on it."""

from collections.abc import Iterator

from benchmarks.gpu.measure import Bench
from benchmarks.gpu.report import Row
from benchmarks.gpu.self_test import check
from benchmarks.gpu.self_test import self_test as on_the_device
from server.weights.arena import VirtualArena, VirtualMemoryUnsupported
from server.weights.cuda_arena import CudaPages
from server.weights.cuda_driver import CudaDriver
from server.weights.staging import HostCopy


def self_test(bench: Bench) -> Iterator[Row]:
    if not bench.scale.is_cuda:
        yield {"case": "virtual memory", **_on_a_fake_driver(bench),
               "skipped": "needs a GPU; these figures are of a driver made of host memory"}  # fmt: skip
        return
    try:
        yield {"case": "virtual memory", **on_the_device(bench.scale.device.index or 0), "ok": True}
    except VirtualMemoryUnsupported as error:
        yield {
            "case": "virtual memory",
            "skipped": f"{error}; adapters get padded memory (server/weights/padded_arena)",
        }


def _on_a_fake_driver(bench: Bench) -> Row:
    """The same checks, so that no name or argument of theirs is wrong."""
    from tests.support.cuda_fake_driver import GRANULE, FakeBindings, FakeCuda

    bindings = FakeBindings(1024 * GRANULE)
    pages = CudaPages(CudaDriver(bindings, 0), bench.scale.device, 0, FakeCuda())
    arena = VirtualArena(1 << 40, pages)
    return check(arena, lambda: bindings.total_bytes - len(bindings.live) * GRANULE, bindings.total_bytes, HostCopy(),
                 num_copied=1 << 12)  # fmt: skip
