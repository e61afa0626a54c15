"""A GPU's pages, copies and what stands in for them, on a fake driver; on a real one where there is a GPU."""

import gc
import logging
import random
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from server.engine.request import FinishReason
from server.engine.residency import AdapterFailed
from server.model.probe import PROBE
from server.weights import choice, cuda_driver, dlpack
from server.weights.arena import ArenaError, PageWork, VirtualArena, VirtualArenas, VirtualMemoryUnsupported
from server.weights.cuda_arena import CudaPages
from server.weights.cuda_driver import CudaDriver, load_driver
from server.weights.dlpack import bytes_at
from server.weights.host_arena import HostPages
from server.weights.padded_arena import BlockArena, PaddedArenas
from server.weights.page_pool import PagePool
from server.weights.staging import HostCopy, PinnedCopy
from server.weights.transfer import Transfer
from tests.model.test_families import reference
from tests.support.cuda_fake_driver import GRANULE, OK, FakeBindings, FakeCuda, Result
from tests.support.engine_harness import Engine, prompts
from tests.support.tiny_adapters import merge, register, save_esft, save_lora
from tests.support.tiny_models import make_model
from tests.weights.test_residency import SteppedTransfers, touches_unmapped, wait_until_resident

CPU = torch.device("cpu")
SLOT = 11 << 19  # 5.5 MiB
NO_MEMORY = Result.CUDA_ERROR_OUT_OF_MEMORY


class Fake:
    """Pages over a fake driver and fake streams, with one log for both."""

    def __init__(self, total_bytes: int = 64 * GRANULE, max_spare: int = 4) -> None:
        self.driver = FakeBindings(total_bytes)
        self.cuda = FakeCuda()
        self.pages = CudaPages(CudaDriver(self.driver, 0), CPU, max_spare, self.cuda)
        self.arenas = VirtualArenas(self.pages)

    def arena(self, num_bytes: int = 1 << 40) -> VirtualArena:
        return VirtualArena(num_bytes, self.pages)

    def granules(self) -> set[int]:
        """Numbers of the mapped granules, in the only reservation."""
        (base,) = self.driver.reserved
        return {(address - base) // GRANULE for address in self.driver.mapped}


@pytest.fixture
def fake() -> Iterator[Fake]:
    yield Fake()
    gc.collect()


def test_slots_that_are_no_multiple_of_a_granule_share_one(fake: Fake) -> None:
    arena = fake.arena()
    assert arena.map(0, SLOT) == 3 and fake.granules() == {0, 1, 2}
    assert arena.pages_to_map(SLOT, SLOT) == 3
    assert arena.map(SLOT, SLOT) == 3 and fake.granules() == {0, 1, 2, 3, 4, 5}
    arena.tensor(SLOT, (SLOT // 2,), torch.bfloat16).fill_(7)
    assert arena.unmap(0, SLOT) == 2 and fake.granules() == {2, 3, 4, 5}  # the second slot still uses granule 2
    assert (arena.tensor(SLOT, (SLOT // 2,), torch.bfloat16) == 7).all()
    assert touches_unmapped(arena, 0) and not touches_unmapped(arena, SLOT)
    arena.check([(SLOT, SLOT)])
    assert arena.unmap(SLOT, SLOT) == 4 and fake.granules() == set()
    assert arena.num_mapped_pages == arena.num_backed_pages == 0


def test_access_is_granted_once_to_each_new_run(fake: Fake) -> None:
    arena = fake.arena()
    (base,) = fake.driver.reserved
    for offset in (0, 2 * SLOT, SLOT):
        arena.map(offset, SLOT)
    granted = [((address - base) // GRANULE, size // GRANULE) for address, size, *_ in calls(fake, "cuMemSetAccess")]
    assert granted == [(0, 3), (5, 4), (3, 2)]  # the third lies between: it adds what its neighbours lack
    arena.map(3 * SLOT, 1)  # in a granule that is there
    assert len(calls(fake, "cuMemSetAccess")) == 3


def calls(fake: Fake, name: str) -> list[tuple[int, ...]]:
    return fake.driver.calls(name)


def test_granules_are_used_again_and_few_are_kept() -> None:
    fake = Fake(max_spare=4)
    arena = fake.arena()
    for _ in range(5):
        arena.map(0, 4 * GRANULE)
        arena.unmap(0, 4 * GRANULE)
    assert len(calls(fake, "cuMemCreate")) == 4 and not calls(fake, "cuMemRelease")
    arena.map(0, 10 * GRANULE)
    arena.unmap(0, 10 * GRANULE)
    assert len(calls(fake, "cuMemCreate")) == 10 and len(calls(fake, "cuMemRelease")) == 6
    assert len(fake.driver.live) == 4


@pytest.mark.parametrize("seed", range(4))
def test_random_ranges_against_a_model(seed: int) -> None:
    """Slots of 1.5 granules; creating fails now and then, or the device is full. Contents survive all of it."""
    rng, fake = random.Random(seed), Fake(total_bytes=24 * GRANULE, max_spare=3)
    arena, stride, failed = fake.arena(), 3 * GRANULE // 2, 0
    live: dict[int, tuple[int, int]] = {}
    for _ in range(300):
        if live and rng.random() < 0.45:
            slot = rng.choice(list(live))
            offset, size = live.pop(slot)
            assert (arena.tensor(offset, (size,), torch.uint8)[::4096] == slot).all()
            arena.unmap(offset, size)
        else:
            slot = rng.choice([slot for slot in range(32) if slot not in live])
            offset, size = slot * stride, rng.randrange(1, stride)
            before, call = fake.driver.state(), rng.choice(["cuMemCreate", "cuMemMap", "cuMemSetAccess"])
            fake.driver.failures = {call: [OK] * rng.randrange(2) + [NO_MEMORY]} if rng.random() < 0.3 else {}
            try:
                arena.map(offset, size)
            except ArenaError:
                failed += 1
                assert fake.driver.state() == before
            else:
                arena.tensor(offset, (size,), torch.uint8)[::4096] = slot
                live[slot] = offset, size
            fake.driver.failures = {}
        ranges = list(live.values())
        expected = {page for at, size in ranges for page in range(at // GRANULE, -(-(at + size) // GRANULE))}
        assert fake.granules() == expected and len(fake.driver.accessible) == len(expected)
        assert arena.num_mapped_pages == arena.num_backed_pages == len(expected)
        assert len(fake.driver.live) <= len(expected) + 3
        arena.check(ranges)
    assert failed > 5


@pytest.mark.parametrize("call", ["cuMemCreate", "cuMemMap", "cuMemSetAccess"])
@pytest.mark.parametrize("num_spare", [0, 2])
def test_a_map_that_fails_leaves_everything_as_it_was(call: str, num_spare: int) -> None:
    fake = Fake()
    arena = fake.arena()
    if num_spare:
        arena.map(0, num_spare * GRANULE)
        arena.unmap(0, num_spare * GRANULE)
    arena.map(0, SLOT)
    before, counts = fake.driver.state(), (arena.num_mapped_pages, arena.num_backed_pages)
    for good in range(5 if call != "cuMemSetAccess" else 1):
        fake.driver.failures = {call: [OK] * good + [NO_MEMORY]}
        with pytest.raises(ArenaError, match=rf"{call} of [\d,]+ bytes on cuda:0 failed: CUDA_ERROR_OUT_OF_MEMORY"):
            arena.map(SLOT, 5 * GRANULE)
        assert fake.driver.state() == before
        assert (arena.num_mapped_pages, arena.num_backed_pages) == counts
        arena.check([(0, SLOT)])
    assert arena.map(SLOT, 5 * GRANULE) == 5


def test_out_of_memory_says_the_numbers() -> None:
    fake = Fake(total_bytes=5 * GRANULE)
    arena = fake.arena()
    arena.map(0, 3 * GRANULE)
    expected = (
        "cuMemCreate of 2,097,152 bytes on cuda:0 failed: CUDA_ERROR_OUT_OF_MEMORY (0 of 10,485,760 bytes free); "
        "2 of the 3 pages of 2,097,152 bytes were there"
    )
    with pytest.raises(ArenaError, match=f"^{re.escape(expected)}$"):
        arena.map(3 * GRANULE, 3 * GRANULE)
    fake.driver.failures = {"cuMemAddressReserve": [NO_MEMORY]}
    with pytest.raises(ArenaError, match="cuMemAddressReserve of 1,099,511,627,776 bytes"):
        fake.arena()


def test_what_could_not_be_unmapped_is_used_by_the_next_map(fake: Fake, caplog: pytest.LogCaptureFixture) -> None:
    arena = fake.arena()
    arena.map(0, 3 * GRANULE)
    fake.driver.failures = {"cuMemUnmap": [OK, Result.CUDA_ERROR_INVALID_VALUE]}
    with caplog.at_level(logging.ERROR, "heddle"):
        arena.unmap(0, 3 * GRANULE)
    assert "cuMemUnmap" in caplog.text and fake.granules() == {1}
    assert arena.map(0, 3 * GRANULE) == 3 and fake.granules() == {0, 1, 2}
    arena.tensor(0, (3 * GRANULE,), torch.uint8).fill_(1)


def test_an_eviction_waits_for_the_kernels_that_were_launched_before_it(fake: Fake) -> None:
    """On the thread that unmaps, by an event of the stream that was current where the range was given up."""
    log: list[object] = []
    fake.cuda.log = fake.driver.log = log  # type: ignore[assignment]
    arena = fake.arenas.slabs(1 << 40)
    arena.map(0, 2 * GRANULE)
    log.clear()
    fake.cuda.is_busy = True
    with fake.arenas.deferred() as work:
        assert arena.unmap(0, 2 * GRANULE) == 2
        assert log == [("record", 1, "compute")]
    work.run()
    names = [entry[0] for entry in log]  # type: ignore[index]
    assert names == ["record", "synchronize", "cuCtxSetCurrent", "cuMemUnmap", "cuMemUnmap"]


def test_deferred_work_is_counted_at_once_and_done_in_order(fake: Fake) -> None:
    arena = fake.arenas.slabs(1 << 40)
    arena.map(0, SLOT)
    arena.tensor(0, (SLOT,), torch.uint8).fill_(1)
    works: list[PageWork] = []
    for act in (lambda: arena.unmap(0, SLOT), lambda: arena.map(0, SLOT), lambda: arena.map(SLOT, SLOT)):
        with fake.arenas.deferred() as work:
            act()
        works.append(work)
    assert arena.num_mapped_pages == 6 and arena.num_backed_pages == 3  # the same slot, evicted and loaded again
    arena.check([(0, SLOT), (SLOT, SLOT)])
    for work in works:
        work.run()
    assert arena.num_backed_pages == 6 and fake.granules() == set(range(6))
    assert len(calls(fake, "cuMemCreate")) == 6  # the first three were used again


def test_a_neighbour_of_a_map_that_failed_maps_the_page_they_share(fake: Fake) -> None:
    """It was not counted as the neighbour's, since the first had it already; but the first never got it."""
    arena = fake.arenas.slabs(1 << 40)
    with fake.arenas.deferred() as first:
        assert arena.map(0, SLOT) == 3
    with fake.arenas.deferred() as second:
        assert arena.map(SLOT, SLOT) == 3
    fake.driver.failures = {"cuMemCreate": [OK, OK, NO_MEMORY]}
    with pytest.raises(ArenaError):
        first.run()
    second.run()
    assert fake.granules() == {2, 3, 4, 5}
    arena.tensor(SLOT, (SLOT,), torch.uint8).fill_(1)
    with fake.arenas.deferred() as third:
        assert arena.unmap(0, SLOT) == 2  # what residency does with a transfer that failed
        assert arena.unmap(SLOT, SLOT) == 4
    third.run()
    assert fake.granules() == set() and arena.num_mapped_pages == arena.num_backed_pages == 0


def test_addresses_and_granules_go_with_the_arena_and_its_last_view(fake: Fake) -> None:
    arena = fake.arena()
    arena.map(0, SLOT)
    view = arena.tensor(0, (11, 1 << 18), torch.bfloat16)
    view.fill_(3)
    del arena
    gc.collect()
    assert (view == 3).all() and fake.driver.reserved
    row = view[4]
    del view
    gc.collect()
    assert (row == 3).all()
    del row
    gc.collect()
    assert not fake.driver.reserved and not fake.driver.mapped and not fake.driver.live


@pytest.mark.parametrize("num_bytes", [0, 1, 100])
def test_bytes_at_an_address(num_bytes: int) -> None:
    class Owner:
        pass

    memory = torch.arange(1024, dtype=torch.int64)
    owner = Owner()
    alive, num_alive = weakref.ref(owner), len(dlpack._alive)
    tensor = bytes_at(memory.data_ptr(), num_bytes, CPU, owner)
    del owner
    assert tensor.shape == (num_bytes,) and tensor.dtype is torch.uint8 and tensor.is_contiguous()
    if num_bytes:
        assert tensor.data_ptr() == memory.data_ptr()
        tensor[-1] = 5
        assert memory.view(torch.uint8)[num_bytes - 1] == 5
        view = tensor[-1:]
        del tensor
        assert alive() is not None and len(dlpack._alive) == num_alive + 1
        del view
    else:
        del tensor
    assert alive() is None and len(dlpack._alive) == num_alive


# -- choosing ---------------------------------------------------------------------------------


def old_driver(name: str) -> FakeBindings:
    fake = FakeBindings()

    def missing(*_: object) -> None:
        raise RuntimeError(f'Function "{name}" not found')

    setattr(fake, name, missing)
    return fake


@pytest.mark.parametrize(
    ("bindings", "reason"),
    [
        (FakeBindings(has_virtual_memory=False), "no virtual memory management"),
        (old_driver("cuMemCreate"), 'cuMemCreate is missing from the driver: Function "cuMemCreate" not found'),
        (old_driver("cuInit"), "cuInit is missing from the driver"),
    ],
)
def test_a_device_without_virtual_memory_gets_padded_arenas(
    bindings: FakeBindings, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("server.weights.cuda_arena.load_driver", lambda ordinal: CudaDriver(bindings, ordinal))
    with caplog.at_level(logging.WARNING, "heddle"):
        assert isinstance(choice.choose_arenas(torch.device("cuda", 0)), PaddedArenas)
    assert reason in caplog.text and "max_experts_per_adapter" in caplog.text
    assert not bindings.reserved and not bindings.live


@pytest.mark.parametrize("call", ["cuMemAddressReserve", "cuMemCreate", "cuMemMap", "cuMemSetAccess"])
def test_a_device_that_refuses_what_it_reports_gets_padded_arenas(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bindings = FakeBindings()
    bindings.failures = {call: [Result.CUDA_ERROR_NOT_SUPPORTED]}
    monkeypatch.setattr("server.weights.cuda_arena.load_driver", lambda ordinal: CudaDriver(bindings, ordinal))
    assert isinstance(choice.choose_arenas(torch.device("cuda", 0)), PaddedArenas)
    assert not bindings.reserved and not bindings.live


def test_a_device_that_is_full_is_no_reason_for_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    bindings = FakeBindings(total_bytes=0)
    monkeypatch.setattr("server.weights.cuda_arena.load_driver", lambda ordinal: CudaDriver(bindings, ordinal))
    with pytest.raises(ArenaError, match="0 of 0 bytes free") as caught:
        choice.choose_arenas(torch.device("cuda", 0))
    assert not isinstance(caught.value, VirtualMemoryUnsupported)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings", None)
    with pytest.raises(VirtualMemoryUnsupported, match="cuda-bindings"):
        cuda_driver.load_driver(0)


def test_the_host_gets_its_own_pages() -> None:
    assert choice.choose_arenas(CPU).page_bytes == HostPages.page_bytes
    assert isinstance(choice.choose_copier(CPU), HostCopy)


# -- padded -----------------------------------------------------------------------------------


def test_padded_stacks_take_their_room_from_the_budget_at_once() -> None:
    pool = PagePool(1 << 20, PaddedArenas.page_bytes)
    arenas = PaddedArenas(CPU)
    arena = arenas.stack(num_bytes=700_000, base_bytes=512 * 100, pool=pool)
    assert pool.num_withdrawn == -(-700_000 // 512) - 100 and pool.num_free == 2048 - pool.num_withdrawn
    assert arena.pages_to_map(512 * 100, 5000) == arena.map(512 * 100, 5000) == arena.unmap(512 * 100, 5000) == 0
    assert arena.num_mapped_pages == 100  # the base's
    with pytest.raises(ArenaError, match=r"649,216 bytes .* where 399,360 are left of 1,048,576 \(adapter_bytes\)"):
        arenas.stack(num_bytes=700_000, base_bytes=512 * 100, pool=pool)


def test_blocks_are_allocated_at_their_true_size() -> None:
    arena = PaddedArenas(CPU).slabs(1 << 45)
    assert isinstance(arena, BlockArena)
    assert arena.pages_to_map(1 << 40, 1000) == arena.map(1 << 40, 1000) == 2
    assert arena.map(1 << 20, 512) == 1
    arena.tensor((1 << 40) + 64, (3, 4), torch.bfloat16).fill_(2)
    assert (arena.tensor((1 << 40) + 64, (12,), torch.bfloat16) == 2).all()
    arena.check([(1 << 40, 1000), (1 << 20, 512)])
    assert arena.unmap(1 << 40, 1000) == 2 and arena.num_mapped_pages == 1


def engine_with(monkeypatch: pytest.MonkeyPatch, family: str, arenas: object, copier: object = None,
                **settings: object) -> Engine:  # fmt: skip
    monkeypatch.setattr("server.assembly.choose_arenas", lambda device: arenas)
    monkeypatch.setattr("server.assembly.choose_copier", lambda device: copier or HostCopy())
    return Engine(make_model(family, attention=PROBE), **settings)


def serve_both_kinds(engine: Engine, tmp_path: Path) -> None:
    """More adapters than slots, of both kinds, each answer as by the merged model alone."""
    model = make_model("qwen3_moe")
    entries = [register(engine, save_lora(tmp_path / f"l{i}", model, i, ("q_proj", "v_proj"))) for i in range(2)]
    entries += [register(engine, save_esft(tmp_path / f"e{i}", model, i, {1: [i, 5], 3: [0, 2]})) for i in range(2)]
    wanted = [(entry, prompt) for entry in entries for prompt in prompts(3)[1:]]
    requests = [engine.add(prompt, 4, entry.ref) for entry, prompt in wanted]
    engine.run(lambda _: engine.residency.check())
    for (entry, prompt), request in zip(wanted, requests, strict=True):
        assert request.tokens == reference(merge(make_model("qwen3_moe"), entry), prompt, 4)
    for entry in entries:
        engine.remove(entry.ref)
    engine.residency.check()
    assert engine.residency._pool.num_used == 0


def test_padded_arenas_serve_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = engine_with(
        monkeypatch, "qwen3_moe", PaddedArenas(CPU), adapter_slots=2, max_experts_per_adapter=3, adapter_bytes=1 << 20
    )
    assert engine.residency._pool.num_withdrawn > 0
    serve_both_kinds(engine, tmp_path)
    big = register(engine, save_lora(tmp_path / "big", make_model("qwen3_moe"), 1, ("q_proj", "v_proj"), rank=640))
    fixed = engine.residency._pool.num_withdrawn * 512
    message = rf"may use {(1 << 20) - fixed:,} \(adapter_bytes less {fixed:,} that expert slots take, used or not\)"
    with pytest.raises(AdapterFailed, match=message):
        engine.residency.acquire(big.ref)


# -- copies -----------------------------------------------------------------------------------


class Source:
    """A tensor's bytes, with each read in the log."""

    def __init__(self, tensor: torch.Tensor, log: list[object]) -> None:
        self.num_bytes, self.dtype, self._log = tensor.nbytes, tensor.dtype, log
        self._raw = bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())

    def read(self, into: memoryview, offset: int) -> None:
        self._log.append(("read", offset, len(into)))
        into[:] = self._raw[offset : offset + len(into)]


def pinned(buffer_bytes: int) -> tuple[PinnedCopy, FakeCuda]:
    cuda = FakeCuda()
    buffers = [torch.empty(buffer_bytes, dtype=torch.uint8) for _ in range(2)]
    return PinnedCopy(buffers, torch.empty(buffer_bytes, dtype=torch.uint8), CPU, cuda), cuda


def test_buffers_are_filled_again_only_after_the_copies_out_of_them() -> None:
    copy, cuda = pinned(256)
    source = Source(torch.randn(150), cuda.log)  # 600 bytes: two buffers and a bit
    place = torch.empty(150)
    cuda.is_busy = True
    run = copy.begin()
    run.put(source.read, 600, torch.float32, place)
    run.end()
    assert cuda.log == [
        ("wait_stream", "copy", "compute"),  # what is computing may still read what was in this place
        ("read", 0, 256),
        ("copy", "copy"),
        ("record", 1, "copy"),  # the first buffer's
        ("synchronize", 2),  # the second's: never recorded, so over
        ("read", 256, 256),
        ("copy", "copy"),
        ("record", 2, "copy"),
        ("synchronize", 1),
        ("read", 512, 88),
        ("copy", "copy"),
        ("record", 3, "copy"),
    ]
    assert not run.is_complete()
    run.join()
    assert cuda.log[-1] == ("wait_event", "compute", 3)
    assert place.view(torch.uint8).numpy().tobytes() == source._raw


@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16, torch.float16])
def test_pieces_and_dtypes(to: torch.dtype) -> None:
    """Tensors smaller and larger than a buffer, one after another; converted where the place is of another dtype."""
    copy, cuda = pinned(192)
    generator = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in ((1,), (3, 5), (7, 31), (48,), (2, 48), (96,)):
            tensor = torch.randn(shape, generator=generator).to(dtype)
            source, place = Source(tensor, cuda.log), torch.full(shape, float("nan"), dtype=to)
            copy._scratch.zero_()
            run = copy.begin()
            run.put(source.read, source.num_bytes, dtype, place)
            run.end()
            assert torch.equal(place, tensor.to(to)) and run.is_complete()
            assert copy._scratch.any() == (dtype is not to)  # converted on the device, or else straight to the place


class Waiting:
    """Copies that are complete when a test says so."""

    def __init__(self) -> None:
        self.complete, self.ended = False, False

    def put(self, *_: object) -> None:
        raise AssertionError("nothing to copy")

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
    transfer = Transfer([], [], work, copies)
    assert not transfer.done
    transfer.run()
    assert copies.ended and not transfer.done
    assert transfer.error == ("no memory" if fails else None)
    copies.complete = True
    assert transfer.done


def raise_no_memory() -> None:
    raise ArenaError("no memory")


# -- the engine over a fake GPU's memory --------------------------------------------------------


def gpu_engine(monkeypatch: pytest.MonkeyPatch, fake: Fake, family: str = "llama", **settings: object) -> Engine:
    buffers = [torch.empty(8192, dtype=torch.uint8) for _ in range(2)]
    copier = PinnedCopy(buffers, torch.empty(8192, dtype=torch.uint8), CPU, fake.cuda)
    return engine_with(monkeypatch, family, fake.arenas, copier, **settings)


def settle(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert condition()


def test_the_engine_serves_from_pages_of_2_mib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both kinds, evictions, staged copies; nothing maps on the thread of the step loop once the model is loaded."""
    fake = Fake(total_bytes=256 * GRANULE)
    engine = gpu_engine(monkeypatch, fake, "qwen3_moe", adapter_slots=2, max_experts_per_adapter=3)
    num_base = len(fake.driver.mapped)
    fake.driver.log.clear()
    serve_both_kinds(engine, tmp_path)
    threads = {thread for name, thread, _ in fake.driver.log if name.startswith("cuMem")}
    assert threads == {"adapter-transfer"} and threading.current_thread().name not in threads
    settle(lambda: len(fake.driver.mapped) == num_base)


def test_out_of_memory_fails_the_transfer_and_nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = Fake()
    engine = gpu_engine(monkeypatch, fake)
    model = make_model("llama")
    good, bad = (register(engine, save_lora(tmp_path / str(i), model, i, ("q_proj",))) for i in range(2))
    wait_until_resident(engine.residency, good)
    fake.driver.failures = {"cuMemCreate": [NO_MEMORY]}
    victim, other = (engine.add(prompts()[1], 5, entry.ref) for entry in (bad, good))
    engine.run()
    assert victim.finish is FinishReason.ERROR
    assert "cuMemCreate of 2,097,152 bytes" in str(victim.error)
    assert other.tokens == reference(merge(make_model("llama"), good), prompts()[1], 5)
    engine.residency.check()
    again = engine.add(prompts()[1], 5, bad.ref)
    engine.run()
    assert again.tokens == reference(merge(make_model("llama"), bad), prompts()[1], 5)


def test_staged_bytes_are_hashed_and_compared_before_they_are_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = Fake()
    engine = gpu_engine(monkeypatch, fake)
    entry = register(engine, save_lora(tmp_path / "a", make_model("llama"), 1, ("q_proj",), rank=40))
    assert entry.package.file_bytes > 2 * 8192  # more than the buffers hold
    file = Path(entry.package.files[0].path)
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 0x80
    file.write_bytes(raw)
    request = engine.add(prompts()[1], 5, entry.ref)
    engine.run()
    assert "changed after it was registered" in str(request.error)
    assert engine.residency.shape_key(1).rank == 0
    engine.residency.check()


def test_an_evicted_slot_is_unmapped_before_it_is_mapped_for_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """While nothing is done at all, the books are exact: the same slot, given up and taken, three times."""
    fake = Fake()
    engine = gpu_engine(monkeypatch, fake, adapter_slots=1)
    residency, transfers = engine.residency, SteppedTransfers()
    residency._transfers = transfers  # type: ignore[assignment]
    model = make_model("llama")
    entries = [register(engine, save_lora(tmp_path / str(i), model, i, ("q_proj",))) for i in range(3)]
    fake.cuda.is_busy = True
    for number, entry in enumerate(entries):
        residency.acquire(entry.ref)
        residency.check()
        assert [type(job) for job in transfers.pending] == [PageWork] * (number > 0) + [Transfer]
        assert residency._pool.num_used == 1 and len(fake.driver.mapped) == (number > 0)
        while transfers.pending:
            transfers.run_next(fails=False)
        residency.poll()
        assert residency.is_loading()  # the copies are not over
        fake.cuda.is_busy = False
        for adapter in residency._adapters.values():
            if adapter.transfer is not None:
                adapter.transfer._copies._landed.is_over = True  # type: ignore[attr-defined]
        residency.poll()
        assert residency.acquire(entry.ref) == 1
        residency.release(entry.ref)
        assert fake.cuda.log[-1][:2] == ("wait_event", "compute")
        fake.cuda.is_busy = True
    names = [name for name, *_ in fake.driver.log if name in ("cuMemCreate", "cuMemMap", "cuMemUnmap")]
    assert names == ["cuMemCreate", "cuMemMap", "cuMemUnmap", "cuMemMap", "cuMemUnmap", "cuMemMap"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_real_device() -> None:
    from server.weights.gpu_self_test import self_test

    try:
        load_driver(0)
    except VirtualMemoryUnsupported as error:
        pytest.skip(str(error))
    figures = self_test()
    assert figures["page_bytes"] >= 1 << 16
