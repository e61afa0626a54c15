"""Files of adapters in host memory: whose chunks are whose, through random jobs that fill, fail and read late."""

import os
import random
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from adapters_store.parts import SourceFile
from server.weights import chunks
from server.weights.arena import ArenaError
from server.weights.chunks import HostChunks
from server.weights.host_cache import CachedFiles, HostCache
from server.weights.sources import CachedFile, fill
from server.weights.transfer import Fetch
from tests.support.transfers import CHUNK, cache, stored

REVISIONS = [f"r{number}" for number in range(8)]
NUM_CHUNKS = 12


class StepJob:
    """Fills or reads a copy as a thread would: some time, and perhaps never well."""

    def __init__(self, copy: CachedFiles) -> None:
        self.copy, self.done = copy, False
        self.was_whole = copy.is_whole
        copy.used_by(self)


class NoMemory:
    """Chunks that nobody touches."""

    chunk_bytes, num_chunks = CHUNK, NUM_CHUNKS

    def chunk(self, index: int) -> torch.Tensor:
        raise AssertionError("bookkeeping touched memory")


def files_of(revision: str, num_chunks: int, version: int = 0) -> list[SourceFile]:
    """Two files, of which the second begins within a chunk or at one."""
    sizes = [CHUNK // 2, num_chunks * CHUNK - CHUNK] if num_chunks > 1 else [1, 0]
    return [SourceFile(f"{revision}.{part}", "/nowhere", size, f"{version}") for part, size in enumerate(sizes)]


class CacheMachine(RuleBasedStateMachine):
    """The model: copies that jobs hold keep their chunks; what is found is whole and of the files that were asked for;
    nothing that is whole goes unheard of; nothing is denied that idle copies could have made room for."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = HostCache(NoMemory())
        self.files = {revision: files_of(revision, 1 + number % 5) for number, revision in enumerate(REVISIONS)}
        self.versions = dict.fromkeys(REVISIONS, 0)
        self.jobs: list[StepJob] = []
        self.known_whole: set[str] = set()

    @rule(revision=st.sampled_from(REVISIONS), starts=st.booleans())
    def reserve(self, revision: str, starts: bool) -> None:
        copy = self.cache.reserve(revision, self.files[revision])
        self.hear()
        if copy is None:
            busy = {id(job.copy): len(job.copy.chunks) for job in self.jobs if not job.done}
            needed = 1 + REVISIONS.index(revision) % 5
            assert NUM_CHUNKS - sum(busy.values()) < needed
            return
        assert copy.is_of(self.files[revision]) and not copy.is_dropped
        assert sum(file.size for file in copy.files) <= copy.num_bytes == self.cache.bytes_of(revision)
        if starts:
            self.jobs.append(StepJob(copy))

    @rule(revision=st.sampled_from(REVISIONS))
    def find(self, revision: str) -> None:
        copy = self.cache.find(revision, self.files[revision])
        assert (copy is not None) == (revision in self.known_whole) or copy is None and self.hear()
        if copy is not None:
            assert copy.is_whole and copy.is_of(self.files[revision])
            assert list(self.cache._copies)[-1] == revision  # used last

    @rule(data=st.data(), ends_well=st.booleans())
    @precondition(lambda self: any(not job.done for job in self.jobs))
    def end(self, data: st.DataObject, ends_well: bool) -> None:
        job = data.draw(st.sampled_from([job for job in self.jobs if not job.done]))
        if ends_well:
            job.copy.is_whole = True
            if not job.copy.is_dropped:
                self.known_whole.add(job.copy.revision)
        job.done = True

    @rule(revision=st.sampled_from(REVISIONS))
    def discard(self, revision: str) -> None:
        self.cache.discard(revision)
        self.known_whole.discard(revision)
        assert self.cache.bytes_of(revision) == 0

    @rule(revision=st.sampled_from(REVISIONS))
    def register_other_files(self, revision: str) -> None:
        self.versions[revision] += 1
        number = REVISIONS.index(revision)
        self.files[revision] = files_of(revision, 1 + number % 5, self.versions[revision])

    def hear(self) -> bool:
        dropped = self.cache.take_dropped()
        assert set(dropped) <= self.known_whole and len(set(dropped)) == len(dropped)
        self.known_whole -= set(dropped)
        return bool(dropped)

    @invariant()
    def books_agree(self) -> None:
        self.cache.check()
        assert self.known_whole == {it.revision for it in self.cache._copies.values() if it.is_whole}
        assert self.cache.num_bytes <= self.cache._num_chunks * self.cache._memory.chunk_bytes
        held = [it for it in {id(job.copy): job.copy for job in self.jobs if not job.done}.values()]
        taken = [chunk for copy in held for chunk in copy.chunks]
        assert len(set(taken)) == len(taken) and not set(taken) & set(self.cache._free)

    def teardown(self) -> None:
        for job in self.jobs:
            job.done = True
        for revision in REVISIONS:
            self.cache.discard(revision)
        self.cache._sweep()
        self.cache.check()
        assert self.cache.num_bytes == 0


CacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestHostCache = CacheMachine.TestCase


def test_the_least_recently_used_gives_way_and_nothing_in_vain(tmp_path: Path) -> None:
    it = cache(num_chunks=4)
    files = {name: [stored(tmp_path, name, os.urandom(2 * CHUNK))] for name in "abc"}
    large = [stored(tmp_path, "large", os.urandom(5 * CHUNK))]

    def fetch(name: str) -> None:
        copy = it.reserve(name, files[name])
        assert copy is not None
        Fetch(copy).run()

    fetch("a")
    fetch("b")
    assert it.find("a", files["a"]) is not None
    assert it.reserve("large", large) is None and it.take_dropped() == []
    fetch("c")
    assert it.take_dropped() == ["b"] and it.find("b", files["b"]) is None
    assert (it.num_bytes, it.bytes_of("a"), it.bytes_of("b")) == (4 * CHUNK, 2 * CHUNK, 0)


def test_no_budget_is_no_cache(tmp_path: Path) -> None:
    it = HostCache(HostChunks(CHUNK - 1, is_pinned=False, chunk_bytes=CHUNK))
    assert it._num_chunks == it.num_bytes == 0
    assert it.reserve("a", [stored(tmp_path, "a", b"a")]) is None


def test_bytes_are_found_wherever_chunks_lie(tmp_path: Path) -> None:
    """Files that end within a chunk, tensors over several: after evictions, in chunks of any order."""
    rng, it = random.Random(3), cache(num_chunks=16)
    raws: dict[str, list[bytes]] = {}
    files: dict[str, list[SourceFile]] = {}
    for number in range(40):
        name = f"a{number}"
        raws[name] = [rng.randbytes(rng.choice([0, 1, 63, 64, 65, 200])) for _ in range(2)]
        files[name] = [stored(tmp_path, f"{name}.{part}", raw) for part, raw in enumerate(raws[name])]
        copy = it.reserve(name, files[name])
        assert copy is not None
        for _ in fill(copy):
            pass
        for seen in list(raws):
            found = it.find(seen, files[seen])
            if found is None:
                del raws[seen]
                continue
            for part, raw in enumerate(raws[seen]):
                offset = rng.randrange(len(raw) + 1)
                into = bytearray(len(raw) - offset)
                CachedFile(found, part).read(offset, memoryview(into))
                assert into == raw[offset:]
        it.check()
    assert 1 < len(raws) < 40


def test_what_a_fetch_reads_is_whole_only_if_it_is_what_was_verified(tmp_path: Path) -> None:
    it = cache()
    good, bad = stored(tmp_path, "good", os.urandom(300)), stored(tmp_path, "bad", os.urandom(300))
    raw = bytearray((tmp_path / "bad").read_bytes())
    raw[299] ^= 1
    (tmp_path / "bad").write_bytes(raw)
    for _ in range(2):
        copy = it.reserve("r", [good, bad])
        assert copy is not None
        fetch = Fetch(copy)
        fetch.run()
        assert fetch.done and fetch.failure is not None and fetch.failure.is_final
        assert "bad changed after it was registered" in fetch.failure.reason
        assert not copy.is_whole and it.find("r", [good, bad]) is None and it.num_bytes == 0
    assert it.take_dropped() == []


def test_a_fetch_that_nobody_wants_any_more_stops_and_gives_its_room_back(tmp_path: Path) -> None:
    it = cache(num_chunks=5)
    files, others = [stored(tmp_path, "a", os.urandom(5 * CHUNK))], [stored(tmp_path, "b", b"b")]
    copy = it.reserve("a", files)
    assert copy is not None
    fetch = Fetch(copy)
    steps = fetch.steps()
    next(steps)
    it.discard("a")
    assert it.reserve("b", others) is None  # it may still write to its chunks
    it.check()
    assert list(steps) == [] and fetch.done
    assert fetch.failure is not None and not fetch.failure.is_final
    assert it.reserve("b", others) is not None
    it.check()


@pytest.mark.parametrize("is_pinned", [False, True])
def test_where_there_is_no_memory_for_chunks_the_fetch_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_pinned: bool
) -> None:
    memory = HostChunks(40 * CHUNK, is_pinned, CHUNK)
    it, files = HostCache(memory), [stored(tmp_path, "a", b"a")]

    def fail(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("out of memory\nand more")

    with monkeypatch.context() as patch:
        patch.setattr(chunks.torch, "empty", fail)
        with pytest.raises(ArenaError):
            memory.chunk(0)
        copy = it.reserve("a", files)
        assert copy is not None
        fetch = Fetch(copy)
        fetch.run()
    kind = "page-locked memory" if is_pinned else "memory"
    assert fetch.failure is not None and not fetch.failure.is_final
    assert fetch.failure.reason == f"cannot allocate {16 * CHUNK:,} bytes of {kind}: out of memory"
    assert it.find("a", files) is None


def test_chunks_are_made_when_first_needed_and_no_more_than_there_are() -> None:
    memory = HostChunks(20 * CHUNK + 5, is_pinned=False, chunk_bytes=CHUNK)
    assert memory.num_chunks == 20 and not memory._extents
    first, last = memory.chunk(0), memory.chunk(19)
    assert first.data_ptr() == memory.chunk(0).data_ptr() and len(first) == len(last) == CHUNK
    assert sum(len(extent) for extent in memory._extents.values()) == 20 * CHUNK
