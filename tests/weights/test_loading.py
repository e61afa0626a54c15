"""The threads that load: what waits for what, and what never does."""

import os
import random
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from adapters_store.parts import SourceFile, TensorRef
from server.weights.arena import ArenaError, PageWork
from server.weights.host_cache import HostCache
from server.weights.loading import Loading
from server.weights.staging import HostCopy
from server.weights.tables.table import Prepared
from server.weights.transfer import Fetch, Transfer
from tests.support.transfers import CHUNK, cache, stored
from tests.support.waiting import eventually


class Held:
    """A step that a thread waits in until a test lets it go on."""

    def __init__(self) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __call__(self) -> Prepared:
        self.reached.set()
        assert self.go_on.wait(60)
        return Prepared([])


def nothing(prepared: Callable[[], Prepared] = lambda: Prepared([]), work: PageWork | None = None) -> Transfer:
    return Transfer([], [prepared], work or PageWork(), HostCopy())


def noting(log: list[str], name: str) -> PageWork:
    work = PageWork()
    work.add(partial(log.append, name))
    return work


def test_memory_for_keys_and_values_does_not_wait_behind_a_copy() -> None:
    loading, held, log = Loading(), Held(), list[str]()
    derived = nothing(lambda: Prepared([], derive=[lambda: (held(), None)[1]]))
    loading.start(derived)
    assert held.reached.wait(60)  # the loading thread is in the middle of it
    loading.do(noting(log, "keys and values"))
    eventually(lambda: log == ["keys and values"])
    assert not derived.done
    held.go_on.set()
    eventually(lambda: derived.done)
    assert derived.failure is None


def test_pages_come_and_go_in_the_order_in_which_they_were_counted() -> None:
    loading, held, log = Loading(), Held(), list[str]()
    blocked = PageWork()
    blocked.add(lambda: (held(), None)[1])
    loading.do(blocked)
    transfers = []
    for number in range(3):
        loading.do(noting(log, f"evict {number}"))
        transfers.append(nothing(work=noting(log, f"map {number}")))
        loading.start(transfers[-1])
    time.sleep(0.02)
    assert not log and not any(it.done for it in transfers)  # each waits for its own pages
    held.go_on.set()
    eventually(lambda: all(it.done for it in transfers))
    assert log == [f"{what} {number}" for number in range(3) for what in ("evict", "map")]


def test_transfers_come_before_fetches_even_before_the_rest_of_one(tmp_path: Path) -> None:
    loading, held, host = Loading(), Held(), cache()
    loading.start(nothing(lambda: Prepared([], derive=[lambda: (held(), None)[1]])))
    assert held.reached.wait(60)
    fetches = []
    for name in "ab":
        copy = host.reserve(name, [stored(tmp_path, name, os.urandom(4 * CHUNK))])
        assert copy is not None
        fetches.append(Fetch(copy))
        loading.start(fetches[-1])
    seen: list[list[bool]] = []

    def look() -> Prepared:
        return Prepared([], derive=[lambda: seen.append([it.done for it in fetches])])

    last = nothing(look)
    loading.start(last)
    eventually(lambda: loading._prepared.qsize() == 3)
    held.go_on.set()
    eventually(lambda: last.done and all(it.done for it in fetches))
    assert seen == [[False, False]] and all(it.failure is None for it in fetches)


def test_a_transfer_is_not_over_while_it_is_still_being_prepared() -> None:
    """Its room would be given back, and what is prepared made of another's."""
    loading, held = Loading(), Held()
    gone = Transfer([SourceFile("f", "/gone", 1, "")], [held], PageWork(), HostCopy())
    loading.start(gone)
    assert held.reached.wait(60)
    time.sleep(0.02)
    assert not gone.done
    held.go_on.set()
    eventually(lambda: gone.done)
    assert gone.failure is not None and not gone.failure.is_final


def test_a_step_that_fails_holds_up_nobody(caplog: pytest.LogCaptureFixture) -> None:
    loading, work, log = Loading(), PageWork(), list[str]()
    work.add(lambda: [][0])
    loading.do(work)
    loading.do(noting(log, "next"))
    eventually(lambda: log == ["next"])
    assert "a step of loading an adapter failed" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="a thread has a priority of its own on Linux only")
def test_what_reads_and_copies_has_a_low_priority_and_nothing_else() -> None:
    loading, told = Loading(), list[int]()

    def ask() -> None:
        told.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    def prepare() -> Prepared:
        ask()
        return Prepared([], derive=[ask])

    work = PageWork()
    work.add(ask)
    before = os.getpriority(os.PRIO_PROCESS, 0)
    transfer = nothing(prepare, work)
    loading.start(transfer)
    eventually(lambda: transfer.done)
    assert sorted(told) == [before, before, 10] and os.getpriority(os.PRIO_PROCESS, 0) == before


class Adapter:
    """A file of known bytes, which may be spoilt, cut or away when somebody wants it."""

    def __init__(self, folder: Path, name: str, count: int) -> None:
        self.name, self.values = name, torch.randn(count)
        self.path = folder / name
        self.raw = self.values.numpy().tobytes()
        self.files = [stored(folder, name, self.raw)]

    def on_disk(self, how: str) -> None:
        self.path.unlink(missing_ok=True)
        if how != "gone":
            changed = {"good": self.raw, "spoilt": self.raw[:-1] + b"\x7f", "cut": self.raw[:-3]}[how]
            self.path.write_bytes(changed)


def test_whatever_happens_what_is_loaded_is_what_was_registered(tmp_path: Path) -> None:
    """Random adapters, from files in any state, by way of a cache that is too small, with pages that cannot be had and
    jobs that overlap: right bytes or a failure of the right kind, and books that agree."""
    rng, loading, host = random.Random(11), Loading(), cache(num_chunks=24)
    adapters = [Adapter(tmp_path, f"a{number}", rng.choice([3, 16, 40, 100])) for number in range(6)]
    under_way: list[tuple[Transfer | Fetch, Adapter, torch.Tensor | None, set[str]]] = []
    state = {it.name: "good" for it in adapters}
    seen: set[str] = set()
    for _ in range(1500):
        it = rng.choice(adapters)
        match rng.randrange(6):
            case 0 if not any(its is it for _, its, *_ in under_way):
                state[it.name] = rng.choice(["good", "good", "good", "spoilt", "cut", "gone"])
                it.on_disk(state[it.name])
            case 1 if len(under_way) < 5:
                room, work = torch.full_like(it.values, torch.nan), PageWork()
                expected = {state[it.name]}
                if rng.random() < 0.1:
                    work.add(no_memory)
                    expected.add("no memory")
                cached = host.reserve(it.name, it.files) if rng.random() < 0.8 else None
                ref = TensorRef(it.name, "t", (len(room),), "F32")
                ready = Prepared([(ref, room)], checked=[room])
                job = Transfer(it.files, [partial(Prepared, *ready)], work, HostCopy(), cached)
                under_way.append((job, it, room, expected))
                loading.start(job)
            case 2 if len(under_way) < 5:
                copy = host.reserve(it.name, it.files)
                if copy is not None:
                    fetch = Fetch(copy)
                    under_way.append((fetch, it, None, {state[it.name]}))
                    loading.start(fetch)
            case 3:
                host.discard(it.name)
            case _:
                time.sleep(0.0002)
        for done in [job for job in under_way if job[0].done]:
            under_way.remove(done)
            seen.add(judge(*done))
        host.take_dropped()
        host.check()
    eventually(lambda: all(job[0].done for job in under_way))
    assert {"loaded", "fetched", "changed", "gone", "no memory"} <= seen
    empty(host, adapters)


def judge(job: Transfer | Fetch, adapter: Adapter, room: torch.Tensor | None, states: set[str]) -> str:
    """What came of it, which must be possible where the file was in this state."""
    failure = job.failure
    if failure is None:
        assert room is None or torch.equal(room, adapter.values)
        assert "no memory" not in states
        return "fetched" if room is None else "loaded"
    if "changed after" in failure.reason:
        assert failure.is_final and states & {"spoilt", "cut"}
        return "changed"
    assert not failure.is_final
    if failure.reason == "nobody wants it any more":
        return "discarded"
    if failure.reason == "no memory":
        assert "no memory" in states
        return "no memory"
    assert failure.reason == "No such file or directory" and "gone" in states
    return "gone"


def empty(host: HostCache, adapters: list[Adapter]) -> None:
    for it in adapters:
        host.discard(it.name)
    host._sweep()
    assert host.num_bytes == 0
    host.check()


def no_memory() -> None:
    raise ArenaError("no memory")
