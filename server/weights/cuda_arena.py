"""Pages of a GPU's memory: granules of 2 MiB, by the virtual memory calls of CUDA's driver.

    reserve   cuMemAddressReserve                      addresses only
    map       cuMemCreate, cuMemMap, cuMemSetAccess    one granule a page, one grant of access a run of pages
    unmap     cuMemUnmap, cuMemRelease                 some granules are kept for the next map

Each call takes tens of microseconds and none is queued on a stream, so they belong to the transfer thread, never to a
step. `python -m benchmarks.gpu.self_test` tests all of it on the GPU at hand.
"""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import torch

from server.weights.arena import ArenaError, VirtualArenas, log
from server.weights.cuda_driver import CudaDriver, load_driver

MAX_SPARE = 512  # granules kept for the next adapter: 1 GiB, all of it once within the adapters' budget


class CudaPages:
    """Physical granules under reserved addresses.

    A kernel may still read a range when its adapter is evicted. So `fence`, which an arena calls where it is told to
    unmap, records an event on the stream that is current there (the one that steps are launched in), and the range is
    unmapped only after that event. Steps launched later cannot read it: the tables no longer lead there.
    """

    def __init__(
        self, driver: CudaDriver, device: torch.device, max_spare: int = MAX_SPARE, cuda: Any = torch.cuda
    ) -> None:
        driver.enter()
        self.page_bytes, self.device = driver.granularity(), device
        self._driver, self._max_spare, self._cuda = driver, max_spare, cuda
        self._handles: dict[int, Any] = {}  # address of a page -> what is mapped there
        self._spare: list[Any] = []
        self._lock = threading.RLock()  # the transfer thread maps; whoever drops an arena releases it

    def reserve(self, num_bytes: int) -> int:
        self._driver.enter()
        return self._driver.reserve(num_bytes)

    def release(self, address: int, num_bytes: int) -> None:
        try:
            with self._lock:
                self._driver.enter()
                self._driver.synchronize()
                for page in [it for it in self._handles if address <= it < address + num_bytes]:
                    self._drop(page, 0)
                self._driver.free_addresses(address, num_bytes)
        except ArenaError as error:
            log.error("%s", error)

    def map(self, address: int, num_bytes: int) -> None:
        pages = range(address, address + num_bytes, self.page_bytes)
        mapped: list[int] = []
        with self._lock:
            self._driver.enter()
            num_spare = len(self._spare)
            try:
                for page in pages:
                    if page not in self._handles:  # else it is left of an unmap that failed
                        self._put(page, num_spare)
                        mapped.append(page)
                self._driver.allow_access(address, num_bytes)
            except ArenaError as error:
                for page in reversed(mapped):
                    with contextlib.suppress(ArenaError):
                        self._drop(page, num_spare)
                done = f"{len(mapped)} of the {len(pages)} pages of {self.page_bytes:,} bytes were there"
                raise type(error)(f"{error}; {done}") from None

    def unmap(self, address: int, num_bytes: int) -> None:
        first_error: ArenaError | None = None
        with self._lock:
            self._driver.enter()
            for page in range(address, address + num_bytes, self.page_bytes):
                try:
                    self._drop(page, self._max_spare)
                except ArenaError as error:
                    first_error = first_error or error
        if first_error is not None:
            raise first_error

    def fence(self) -> Callable[[], None]:
        event = self._cuda.Event(blocking=True)
        event.record(self._cuda.current_stream(self.device))
        return event.synchronize  # type: ignore[no-any-return]

    def probe(self) -> None:
        """Map one page and give it back: some devices report virtual memory and refuse it."""
        address = self.reserve(self.page_bytes)
        try:
            self.map(address, self.page_bytes)
        finally:
            self.release(address, self.page_bytes)

    def _put(self, page: int, max_spare: int) -> None:
        handle = self._spare.pop() if self._spare else self._driver.create(self.page_bytes)
        try:
            self._driver.map(page, self.page_bytes, handle)
        except ArenaError:
            self._keep(handle, max_spare)
            raise
        self._handles[page] = handle

    def _drop(self, page: int, max_spare: int) -> None:
        self._driver.unmap(page, self.page_bytes)
        self._keep(self._handles.pop(page), max_spare)

    def _keep(self, handle: Any, max_spare: int) -> None:
        if len(self._spare) < max_spare:
            self._spare.append(handle)
        else:
            self._driver.release(handle)


def cuda_arenas(device: torch.device) -> VirtualArenas:
    """Raises VirtualMemoryUnsupported where that cannot be had."""
    ordinal = torch.cuda.current_device() if device.index is None else device.index
    pages = CudaPages(load_driver(ordinal), torch.device("cuda", ordinal))
    pages.probe()
    return VirtualArenas(pages)
