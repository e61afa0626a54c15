"""Residency without waiting in vain: loads that are done when a test says so, and a wait that ends."""

import time
from collections.abc import Iterator

from adapters_store.rules import Adapter
from server.engine.residency import Wait
from server.weights.arena import ArenaError, PageWork
from server.weights.failures import UnusableAdapter
from server.weights.residency import DeviceResidency
from server.weights.transfer import Fetch, Transfer

GONE: BaseException = FileNotFoundError(2, "No such file or directory")
NO_MEMORY: BaseException = ArenaError("cuMemCreate of 2,097,152 bytes failed: out of memory")
CHANGED: BaseException = UnusableAdapter("a.safetensors changed after it was registered; register the adapter again")


class SteppedLoading:
    """Loads and page work that are done when a test says so, well or badly, in order."""

    def __init__(self, residency: DeviceResidency) -> None:
        self.pending: list[Transfer | Fetch | PageWork] = []
        residency._loading = self  # type: ignore[assignment]

    def start(self, job: Transfer | Fetch) -> None:
        self.pending.append(job)

    def do(self, work: PageWork) -> None:
        self.pending.append(work)

    def run_next(self, fault: BaseException | None = None) -> None:
        """fault: what reading the files comes to, or mapping its pages."""
        job = self.pending.pop(0)
        if isinstance(job, PageWork):
            job.run()
            return
        if fault is not None:
            _break(job, fault)
        job.map_pages()
        job.run()

    def run_all(self) -> None:
        while self.pending:
            self.run_next()


def _break(job: Transfer | Fetch, fault: BaseException) -> None:
    if isinstance(job, Transfer) and (job._cached is None or job._cached.is_whole):
        if isinstance(fault, ArenaError):
            job._pages.add(lambda: _raise(fault))
        else:
            job._tables = [lambda: _raise(fault)]
    elif job._cached is not None and not job._cached.is_whole:
        job._cached.filling = _raising(fault)


def _raise(error: BaseException) -> None:
    raise error


def _raising(error: BaseException) -> Iterator[None]:
    raise error
    yield


def wait_until_resident(residency: DeviceResidency, entry: Adapter) -> int:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        residency.poll()
        slot = residency.acquire(entry.ref)
        if not isinstance(slot, Wait):
            return slot
        time.sleep(0.001)
    raise AssertionError("the adapter did not become resident")
