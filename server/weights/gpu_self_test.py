"""What tests without a GPU cannot show: `python -m server.weights.gpu_self_test` on the machine that has one.

Raises AssertionError or ArenaError, else returns figures. Memory is counted by the driver, so nothing else may be
allocating on the device meanwhile.
"""

import time

import torch

from server.weights.arena import ArenaError, VirtualArena
from server.weights.cuda_arena import CudaPages
from server.weights.cuda_driver import load_driver
from server.weights.staging import pinned_copy

_SLOT = 11 << 19  # 5.5 MiB: not a multiple of a page
_SHAPE = (1408, 2048)


def self_test(ordinal: int = 0) -> dict[str, float]:
    device = torch.device("cuda", ordinal)
    assert _holds(torch.empty(_SHAPE, dtype=torch.bfloat16, device=device).fill_(1), 1)  # loads these kernels
    pages = CudaPages(load_driver(ordinal), device, max_spare=0)
    arena = VirtualArena(1 << 40, pages)
    figures = {"page_bytes": float(pages.page_bytes)}
    used = _Used(device)
    _check_contents_and_memory(arena, used)
    _check_out_of_memory(arena, used)
    figures |= _map_times(arena)
    figures |= _check_copies(arena, device)
    arena.close()
    return figures


def _holds(tensor: torch.Tensor, value: int) -> bool:
    return bool((tensor == value).all().item())


class _Used:
    """Bytes that the device has less of than at first. Other allocations may blur it by a few pages."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._free = device, 0
        self._free = -self.num_bytes()

    def num_bytes(self) -> int:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        return self._free - torch.cuda.mem_get_info(self._device)[0]

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


def _check_out_of_memory(arena: VirtualArena, used: _Used) -> None:
    too_much = torch.cuda.mem_get_info()[1]
    try:
        arena.map(0, too_much)
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


def _check_copies(arena: VirtualArena, device: torch.device) -> dict[str, float]:
    """256 MiB through buffers of 8 MiB, as they are and converted."""
    source = torch.randn(1 << 26)
    raw = memoryview(source.numpy()).cast("B")

    def read(into: memoryview, offset: int) -> None:
        into[:] = raw[offset : offset + len(into)]

    arena.map(0, source.nbytes)
    copy, seconds = pinned_copy(device, 8 << 20), {}
    for dtype in (torch.float32, torch.bfloat16):
        place = arena.tensor(0, tuple(source.shape), dtype)
        start = time.perf_counter()
        run = copy.begin()
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
