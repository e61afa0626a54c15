"""Copies from verified files: every byte once, hashed on its way, and done when the device is."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from adapters_store.files import read_exactly
from adapters_store.parts import TensorRef
from server.engine.request import FinishReason
from server.engine.residency import AdapterFailed
from server.model.probe import PROBE
from server.weights import sources
from server.weights.arena import ArenaError, PageWork
from server.weights.chunks import HostChunks
from server.weights.failures import LoadFailure
from server.weights.finite import ROOM_BYTES, are_finite_on_host
from server.weights.host_cache import CachedFiles
from server.weights.runs import Run, in_runs
from server.weights.staging import PinnedCopy
from server.weights.tables.gains import GainError
from server.weights.tables.table import Prepared
from server.weights.transfer import Fetch, Transfer
from tests.support.cuda_fake_driver import FakeCuda
from tests.support.engine_harness import Engine, prompts
from tests.support.stepped_residency import wait_until_resident
from tests.support.tiny_adapters import merge, register, save_esft, save_lora
from tests.support.tiny_models import make_model, reference
from tests.support.transfers import CHUNK, WAYS, cache, run, stored, transfer


@pytest.mark.parametrize("way", WAYS)
def test_every_byte_is_read_once_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    entry = register(
        Engine(make_model("llama", attention=PROBE)),
        save_lora(tmp_path / "a", make_model("llama"), 1, ("q_proj", "o_proj")),
    )
    reads: list[tuple[int, int]] = []

    def read(descriptor: int, offset: int, into: memoryview) -> None:
        reads.append((offset, len(into)))
        read_exactly(descriptor, offset, into)

    monkeypatch.setattr(sources, "read_exactly", read)
    tensors = [tensor for part in reversed(entry.package.parts) for tensor in part.tensors]
    places = [(tensor, torch.full(tensor.shape, math.nan)) for tensor in tensors]
    assert run(transfer(entry.package.files, places, way)).failure is None
    ends = [0, *(offset + size for offset, size in reads)]
    assert [offset for offset, _ in reads] == ends[:-1] and ends[-1] == entry.package.file_bytes
    weights = load_file(entry.package.files[0].path)
    assert all(torch.equal(place, weights[tensor.key]) for tensor, place in places)


def test_a_file_that_changed_after_registration_fails_its_requests_only(tmp_path: Path) -> None:
    model = make_model("llama")
    engine = Engine(make_model("llama", attention=PROBE))
    good = register(engine, save_lora(tmp_path / "good", model, 1, ("q_proj",)))
    bad = register(engine, save_lora(tmp_path / "bad", model, 2, ("q_proj",)))
    file = tmp_path / "bad" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    victim, other = engine.add(prompts()[1], 5, bad.ref), engine.add(prompts()[1], 5, good.ref)
    engine.run()
    assert victim.finish is FinishReason.ERROR
    assert "changed after it was registered" in str(victim.error)
    assert other.tokens == reference(merge(make_model("llama"), good), prompts()[1], 5)


@pytest.mark.parametrize("where", ["header", "first", "last", "link"])
def test_other_bytes_of_the_same_size_and_time_are_never_served(tmp_path: Path, where: str) -> None:
    """Registered, served, evicted, changed in place, asked for again: hashed as it is copied, so not installed."""
    model = make_model("qwen3_moe")
    engine = Engine(make_model("qwen3_moe", attention=PROBE), adapter_slots=1, host_cache_bytes=0)
    entry = register(engine, save_esft(tmp_path / "victim", model, 1, {1: [0, 5], 3: [2]}))
    other = register(engine, save_lora(tmp_path / "other", model, 2, ("q_proj",)))
    for it in (entry, other):  # the second evicts the first
        wait_until_resident(engine.residency, it)
        engine.residency.release(it.ref)
    file = Path(entry.package.files[0].path)
    before, raw = file.stat(), bytearray(file.read_bytes())
    first = min(tensor.offset for part in entry.package.parts for tensor in part.tensors)
    if where == "link":  # the very same bytes, but nobody has looked where they come from
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    else:
        at = {"header": 8 + raw[8:].index(b"{") + 1, "first": first, "last": len(raw) - 1}[where]
        raw[at] ^= 0x80 if where != "header" else 0x02
        file.write_bytes(raw)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    says = "Not a directory|symbolic links" if where == "link" else "changed after it was registered; register .* again"
    with pytest.raises(AdapterFailed, match=says):
        wait_until_resident(engine.residency, entry)
    assert not engine.residency.shape_key(1).experts and engine.assembly.tables.experts.num_mapped_pages == 0
    engine.residency.check()


class Waiting:
    """Copies that are complete when a test says so."""

    def __init__(self) -> None:
        self.complete, self.ended = False, False

    def put(self, *_: object) -> None:
        raise AssertionError("nothing to copy")

    put_lasting = compute = put

    def are_finite(self, tensors: Sequence[torch.Tensor]) -> bool:
        return True

    def end(self) -> None:
        self.ended = True

    def is_complete(self) -> bool:
        return self.complete

    def join(self) -> None:
        pass


@pytest.mark.parametrize("fails", [False, True])
def test_a_transfer_is_done_when_the_device_is(fails: bool) -> None:
    """Also one that failed: its first copies may still be writing to the pages that will be unmapped."""
    copies, work = Waiting(), PageWork()
    if fails:
        work.add(raise_no_memory)
    it = Transfer([], [], work, copies)
    assert not it.done
    it.map_pages()
    it.run()
    assert copies.ended and not it.done
    assert it.failure == (LoadFailure("no memory", is_final=False) if fails else None)
    copies.complete = True
    assert it.done


def raise_no_memory() -> None:
    raise ArenaError("no memory")


class Small:
    """One file with two tensors, and where they go."""

    def __init__(self, folder: Path, values: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
        self.path = folder / "weights"
        raw = values.numpy().tobytes()
        self.files = [stored(folder, "weights", b"head" + raw)]
        self.values, half = values, len(values) // 2
        refs = [TensorRef("weights", f"t{at}", (half,), "F32", 4 + at * half * 4) for at in range(2)]
        self.room = torch.full((2 * half,), math.nan, dtype=dtype)
        self.places = list(zip(refs, self.room.split(half), strict=True))

    def transfer(self, way: str = "host disk", cached: CachedFiles | None = None) -> Transfer:
        self.room.fill_(math.nan)
        return transfer(self.files, self.places, way, self.checking, cached=cached)

    def checking(self, prepared: Prepared) -> Prepared:
        return prepared._replace(checked=[self.room])


@pytest.mark.parametrize("way", WAYS)
def test_tensors_that_lie_together_here_and_there_are_copied_as_one(tmp_path: Path, way: str) -> None:
    it = Small(tmp_path, torch.randn(64))
    (run_of_both,) = in_runs(it.places)
    assert isinstance(run_of_both, Run) and run_of_both.num_bytes == 256
    assert run(it.transfer(way)).failure is None
    assert torch.equal(it.room, it.values)


def test_what_lies_together_by_chance_is_not() -> None:
    """Another type, a gap, another order, memory that is not one: each for itself."""
    room, other = torch.zeros(32), torch.zeros(8, dtype=torch.bfloat16)

    def ref(offset: int, count: int = 8, dtype: str = "F32") -> TensorRef:
        return TensorRef("f", str(offset), (count,), dtype, offset)

    for second in ((ref(36), room[8:16]), (ref(32), room[16:24]), (ref(32, 8, "BF16"), room[8:16]), (ref(32), other),
                   (ref(32), room[:8]), (ref(32, 4), room[8:16:2])):  # fmt: skip
        assert len(list(in_runs([(ref(0), room[:8]), second]))) == 2
    columns = room.view(4, 8)[:, :2]
    assert len(list(in_runs([(ref(0), columns), (ref(32), room[8:16])]))) == 2


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("at", [0, 3, 4, 200, 259])
def test_a_bit_that_flips_on_disk_is_noticed_wherever_it_is(tmp_path: Path, way: str, at: int) -> None:
    it = Small(tmp_path, torch.randn(64))
    raw = bytearray(it.path.read_bytes())
    raw[at] ^= 4
    it.path.write_bytes(raw)
    failure = run(it.transfer(way)).failure
    assert failure is not None and failure.is_final and "changed after it was registered" in failure.reason


@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_is_gone_may_come_back(tmp_path: Path, way: str) -> None:
    it = Small(tmp_path, torch.randn(64))
    it.path.rename(tmp_path / "away")
    failure = run(it.transfer(way)).failure
    assert failure == LoadFailure("No such file or directory", is_final=False)
    (tmp_path / "away").rename(it.path)
    assert run(it.transfer(way)).failure is None and torch.equal(it.room, it.values)


@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_is_cut_short_while_it_is_read_is_an_error_and_not_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    it = Small(tmp_path, torch.randn(64))

    def cut_and_read(descriptor: int, offset: int, into: memoryview) -> None:
        os.truncate(it.path, 100)
        read_exactly(descriptor, offset, into)

    monkeypatch.setattr(sources, "read_exactly", cut_and_read)
    assert run(it.transfer(way)).failure == LoadFailure("it ends before its data", is_final=False)
    failure = run(it.transfer(way)).failure  # and now its size is another
    assert failure is not None and failure.is_final


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("value", "dtype"), [(math.nan, torch.float32), (-math.inf, torch.float32), (1e5, torch.float16),
                         (-3.4e38, torch.bfloat16)],
)  # fmt: skip
def test_values_that_are_not_finite_where_they_are_used_are_never_served(
    tmp_path: Path, way: str, value: float, dtype: torch.dtype
) -> None:
    values = torch.full((64,), 0.5)
    assert run(Small(tmp_path, values, dtype).transfer(way)).failure is None
    values[40] = value
    failure = run(Small(tmp_path, values, dtype).transfer(way)).failure
    kind = str(dtype).removeprefix("torch.")
    assert failure == LoadFailure(f"t1 holds values that are not finite as {kind}; register another", is_final=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_finite_values_are_told_from_others_at_their_ends(dtype: torch.dtype) -> None:
    scratch = np.zeros(ROOM_BYTES, np.uint8)
    limits = torch.finfo(dtype)
    sound = torch.tensor([limits.max, limits.min, 0.0, -0.0, limits.tiny], dtype=dtype).repeat(
        60_000
    )  # over the scratch
    assert are_finite_on_host(sound, scratch) and are_finite_on_host(sound[:0], scratch)
    for bad in (math.inf, -math.inf, math.nan, -math.nan):
        for at in (0, 150_000, len(sound) - 1):
            spoilt = sound.clone()
            spoilt[at] = bad
            assert not are_finite_on_host(spoilt, scratch)


def test_what_the_base_cannot_take_is_final(tmp_path: Path) -> None:
    it = Small(tmp_path, torch.randn(64))

    def derive() -> None:
        raise GainError("row 3 has no norm")

    done = run(transfer(it.files, it.places, derive=[derive]))
    assert done.failure == LoadFailure("row 3 has no norm", is_final=True)


@pytest.mark.parametrize("way", WAYS)
def test_where_the_device_has_no_memory_the_files_are_kept_for_the_next_time(tmp_path: Path, way: str) -> None:
    it, work = Small(tmp_path, torch.randn(64)), PageWork()
    work.add(raise_no_memory)
    cached = cache().reserve("r", it.files) if "cache" in way else None
    done = run(transfer(it.files, it.places, way.split()[0], it.checking, work=work, cached=cached))
    assert done.failure == LoadFailure("no memory", is_final=False) and it.room.isnan().all()
    assert cached is None or cached.is_whole


def test_without_memory_for_its_files_an_adapter_is_loaded_from_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    it, host = Small(tmp_path, torch.randn(64)), cache()
    monkeypatch.setattr(HostChunks, "_allocate", lambda *_: raise_no_memory())
    done = run(it.transfer(cached=host.reserve("r", it.files)))
    assert done.failure is None and torch.equal(it.room, it.values)
    assert "without the host's cache: no memory" in caplog.text
    assert host.find("r", it.files) is None and host.num_bytes == 0


def test_a_whole_copy_is_read_instead_of_the_disk(tmp_path: Path) -> None:
    it, host = Small(tmp_path, torch.randn(64)), cache()
    assert run(it.transfer(cached=host.reserve("r", it.files))).failure is None
    it.path.unlink()
    assert run(it.transfer(cached=host.find("r", it.files))).failure is None and torch.equal(it.room, it.values)


def test_a_transfer_goes_on_where_a_fetch_has_come_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    it, host = Small(tmp_path, torch.randn(64)), cache()
    reads: list[int] = []

    def read(descriptor: int, offset: int, into: memoryview) -> None:
        reads.append(offset)
        read_exactly(descriptor, offset, into)

    monkeypatch.setattr(sources, "read_exactly", read)
    copy = host.reserve("r", it.files)
    assert copy is not None
    fetch = Fetch(copy)
    assert host.reserve("r", it.files) is copy and host.find("r", it.files) is None
    steps = fetch.steps()
    next(steps)
    assert run(it.transfer(cached=copy)).failure is None and torch.equal(it.room, it.values)
    assert list(steps) == [] and fetch.done and fetch.failure is None
    assert reads == [0, 64, 128, 192, 256]


def test_what_is_discarded_while_a_transfer_fills_it_is_still_loaded(tmp_path: Path) -> None:
    it, host = Small(tmp_path, torch.randn(64)), cache(num_chunks=5)
    loading = it.transfer(cached=host.reserve("r", it.files))
    host.discard("r")
    assert host.num_bytes == 5 * CHUNK and host.reserve("s", it.files) is None
    assert run(loading).failure is None and torch.equal(it.room, it.values)
    assert host.reserve("s", it.files) is not None
    host.check()


def test_chunks_wait_for_the_copies_out_of_them(tmp_path: Path) -> None:
    """A transfer may have been run to its end while the device still reads."""
    it, host, cuda = Small(tmp_path, torch.randn(64)), cache(num_chunks=5), FakeCuda()
    buffers = [torch.zeros(128, dtype=torch.uint8) for _ in range(2)]
    copies = PinnedCopy(buffers, torch.zeros(128, dtype=torch.uint8), torch.device("cpu"), cuda).begin()
    cuda.is_busy = True
    loading = Transfer(it.files, [lambda: Prepared(it.places)], PageWork(), copies, host.reserve("r", it.files))
    loading.map_pages()
    loading.run()
    host.discard("r")
    assert not loading.done and host.reserve("s", it.files) is None
    copies._landed.is_over = True
    assert loading.done and host.reserve("s", it.files) is not None
    host.check()
