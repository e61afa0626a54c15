"""Residency without waiting in vain: transfers that are done when a test says so, and a wait that ends."""

import time

from adapters_store.parts import SourceFile
from adapters_store.rules import Adapter
from server.engine.residency import Wait
from server.weights.residency import DeviceResidency
from server.weights.transfer import Job, Transfer


class SteppedTransfers:
    """Transfers and page work that are done when a test says so, well or badly, in order."""

    def __init__(self) -> None:
        self.pending: list[Job] = []

    def start(self, job: Job) -> None:
        self.pending.append(job)

    def run_next(self, fails: bool) -> None:
        job = self.pending.pop(0)
        if fails and isinstance(job, Transfer):
            job._files = [SourceFile("gone", "/gone", 0, "")]
        job.run()


def wait_until_resident(residency: DeviceResidency, entry: Adapter) -> int:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        residency.poll()
        slot = residency.acquire(entry.ref)
        if not isinstance(slot, Wait):
            return slot
        time.sleep(0.001)
    raise AssertionError("the adapter did not become resident")
