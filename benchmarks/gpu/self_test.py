"""What tests without a GPU cannot show: `python -m benchmarks.gpu.self_test` on the machine that has one.

Raises AssertionError or ArenaError, else returns figures. Memory is counted by the driver, so nothing else may be
allocating on the device meanwhile.
"""

import time
from collections.abc import Callable

import torch

from server.weights.arena import ArenaError, VirtualArena
from server.weights.cuda_arena import CudaPages
from server.weights.cuda_driver import load_driver
from server.weights.staging import Copier, pinned_copy

_SLOT = 11 << 19  # 5.5 MiB: not a multiple of a page
_SHAPE = (1408, 2048)


def self_test(ordinal: int = 0) -> dict[str, float]:
    device = torch.device("cuda", ordinal)
    assert _holds(torch.empty(_SHAPE, dtype=torch.bfloat16, device=device).fill_(1), 1)  # loads these kernels
    arena = VirtualArena(1 << 40, CudaPages(load_driver(ordinal), device, max_spare=0))

    def free_bytes() -> int:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]

    return check(arena, free_bytes, torch.cuda.mem_get_info(device)[1], pinned_copy(device, 8 << 20))


def check(
    arena: VirtualArena, free_bytes: Callable[[], int], total_bytes: int, copier: Copier, num_copied: int = 1 << 26
) -> dict[str, float]:
    """free_bytes and total_bytes: of the device. num_copied: elements."""
    used = _Used(free_bytes)
    _check_contents_and_memory(arena, used)
    _check_out_of_memory(arena, used, total_bytes)
    figures = {"page_bytes": float(arena.page_bytes)} | _map_times(arena) | _check_copies(arena, copier, num_copied)
    arena.close()
    return figures


def _holds(tensor: torch.Tensor, value: int) -> bool:
    return bool((tensor == value).all().item())


class _Used:
    """Bytes that the device has less of than at first. Other allocations may blur it by a few pages."""

    def __init__(self, free_bytes: Callable[[], int]) -> None:
        self._free_bytes, self._at_first = free_bytes, free_bytes()

    def num_bytes(self) -> int:
        return self._at_first - self._free_bytes()

    def check(self, num_bytes: int) -> None:
        assert abs(self.num_bytes() - num_bytes) <= 8 << 20, f"{self.num_bytes():,} bytes used, not {num_bytes:,}"


def _check_contents_and_memory(arena: VirtualArena, used: _Used) -> None:
    slots = [number * _SLOT for number in range(40)] + [((1 << 40) // _SLOT - 1) * _SLOT]
    for offset in slots:
        arena.map(offset, _SLOT)
    used.check(arena.num_backed_pages * arena.page_bytes)
    views = [arena.tensor(offset, _SHAPE, torch.bfloat16) for offset in slots]
    for number, view in enumerate(views):
        view.fill_(number)
    assert all(_holds(view, number) for number, view in enumerate(views))
    for offset in slots[::2]:
        arena.unmap(offset, _SLOT)  # a kernel has only just read it
    assert all(_holds(views[number], number) for number in range(1, len(views), 2)), "a neighbour suffered"
    used.check(arena.num_backed_pages * arena.page_bytes)
    for offset in slots[1::2]:
        arena.unmap(offset, _SLOT)
    used.check(0)
    assert arena.num_mapped_pages == arena.num_backed_pages == 0


def _check_out_of_memory(arena: VirtualArena, used: _Used, total_bytes: int) -> None:
    try:
        arena.map(0, total_bytes + arena.page_bytes)
    except ArenaError as error:
        assert "CUDA_ERROR_OUT_OF_MEMORY" in str(error), error
    else:
        raise AssertionError("mapped more than there is")
    used.check(0)
    assert arena.num_mapped_pages == arena.num_backed_pages == 0


def _map_times(arena: VirtualArena, num_pages: int = 512) -> dict[str, float]:
    start = time.perf_counter()
    arena.map(0, num_pages * arena.page_bytes)
    mapped = time.perf_counter()
    arena.unmap(0, num_pages * arena.page_bytes)
    unmapped = time.perf_counter()
    return {
        "map_us_per_page": (mapped - start) / num_pages * 1e6,
        "unmap_us_per_page": (unmapped - mapped) / num_pages * 1e6,
    }


def _check_copies(arena: VirtualArena, copier: Copier, num_copied: int) -> dict[str, float]:
    """Through page-locked buffers, as they are and converted."""
    source = torch.randn(num_copied)
    raw = memoryview(source.numpy()).cast("B")

    def read(into: memoryview, offset: int) -> None:
        into[:] = raw[offset : offset + len(into)]

    arena.map(0, source.nbytes)
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        place = arena.tensor(0, tuple(source.shape), dtype)
        start = time.perf_counter()
        run = copier.begin()
        run.put(read, source.nbytes, source.dtype, place)
        run.end()
        while not run.is_complete():
            time.sleep(0.0001)
        seconds[dtype] = time.perf_counter() - start
        run.join()
        assert torch.equal(place.cpu(), source.to(dtype))
    arena.unmap(0, source.nbytes)
    return {f"copy_gb_per_s_to_{str(it).removeprefix('torch.')}": source.nbytes / s / 1e9 for it, s in seconds.items()}


if __name__ == "__main__":
    for name, value in self_test().items():
        print(f"{name}: {value:,.1f}")
