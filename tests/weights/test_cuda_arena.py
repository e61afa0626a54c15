"""Arenas over a GPU's granules, on a fake driver that is as strict as the real one."""

import gc
import logging
import random
import re
from collections.abc import Iterator

import pytest
import torch

from server.weights.arena import ArenaError, PageWork
from tests.support.cuda_fake_driver import GRANULE, NO_MEMORY, OK, Result
from tests.support.fake_gpu import FakeGpu
from tests.support.process_memory import touches_unmapped

SLOT = 11 << 19  # 5.5 MiB


@pytest.fixture
def fake() -> Iterator[FakeGpu]:
    yield FakeGpu()
    gc.collect()


def test_slots_that_are_no_multiple_of_a_granule_share_one(fake: FakeGpu) -> None:
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


def test_access_is_granted_once_to_each_new_run(fake: FakeGpu) -> None:
    arena = fake.arena()
    (base,) = fake.driver.reserved
    for offset in (0, 2 * SLOT, SLOT):
        arena.map(offset, SLOT)
    granted = [
        ((address - base) // GRANULE, size // GRANULE) for address, size, *_ in fake.driver.calls("cuMemSetAccess")
    ]
    assert granted == [(0, 3), (5, 4), (3, 2)]  # the third lies between: it adds what its neighbours lack
    arena.map(3 * SLOT, 1)  # in a granule that is there
    assert len(fake.driver.calls("cuMemSetAccess")) == 3


def test_granules_are_used_again_and_few_are_kept() -> None:
    fake = FakeGpu(max_spare=4)
    arena = fake.arena()
    for _ in range(5):
        arena.map(0, 4 * GRANULE)
        arena.unmap(0, 4 * GRANULE)
    assert len(fake.driver.calls("cuMemCreate")) == 4 and not fake.driver.calls("cuMemRelease")
    arena.map(0, 10 * GRANULE)
    arena.unmap(0, 10 * GRANULE)
    assert len(fake.driver.calls("cuMemCreate")) == 10 and len(fake.driver.calls("cuMemRelease")) == 6
    assert len(fake.driver.live) == 4


@pytest.mark.parametrize("seed", range(4))
def test_random_ranges_against_a_model(seed: int) -> None:
    """Slots of 1.5 granules; creating fails now and then, or the device is full. Contents survive all of it."""
    rng, fake = random.Random(seed), FakeGpu(total_bytes=24 * GRANULE, max_spare=3)
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
    fake = FakeGpu()
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
    fake = FakeGpu(total_bytes=5 * GRANULE)
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


def test_what_could_not_be_unmapped_is_used_by_the_next_map(fake: FakeGpu, caplog: pytest.LogCaptureFixture) -> None:
    arena = fake.arena()
    arena.map(0, 3 * GRANULE)
    fake.driver.failures = {"cuMemUnmap": [OK, Result.CUDA_ERROR_INVALID_VALUE]}
    with caplog.at_level(logging.ERROR, "heddle"):
        arena.unmap(0, 3 * GRANULE)
    assert "cuMemUnmap" in caplog.text and fake.granules() == {1}
    assert arena.map(0, 3 * GRANULE) == 3 and fake.granules() == {0, 1, 2}
    arena.tensor(0, (3 * GRANULE,), torch.uint8).fill_(1)


def test_an_eviction_waits_for_the_kernels_that_were_launched_before_it(fake: FakeGpu) -> None:
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


def test_deferred_work_is_counted_at_once_and_done_in_order(fake: FakeGpu) -> None:
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
    assert len(fake.driver.calls("cuMemCreate")) == 6  # the first three were used again


def test_a_neighbour_of_a_map_that_failed_maps_the_page_they_share(fake: FakeGpu) -> None:
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


def test_addresses_and_granules_go_with_the_arena_and_its_last_view(fake: FakeGpu) -> None:
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
