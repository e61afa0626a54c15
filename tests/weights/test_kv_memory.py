"""KV blocks in memory that adapters may have instead: pages come and go with extents, and the account is exact."""

import mmap
import random

import pytest
import torch

from server.engine.block_pool import BlockPool
from server.weights.arena import ArenaError, PageWork, VirtualArenas
from server.weights.budget import MemoryBudget
from server.weights.cuda_arena import CudaPages
from server.weights.cuda_driver import CudaDriver
from server.weights.host_arena import HUGE_PAGE_BYTES, HostPages, host_arenas
from server.weights.kv_memory import IdleBlocks, Layout, SharedKVMemory, WholeKVMemory
from tests.support.cuda_fake_driver import GRANULE, FakeBindings, FakeCuda

PAGE = mmap.PAGESIZE
CPU = torch.device("cpu")
HEADS, DIM, BLOCK = 2, 16, 4  # 512 bytes a block in float32: 8 to a page


class Setup:
    """Two tensors of 512 bytes a block, and a share of the budget that adapters contend for."""

    def __init__(self, arenas: VirtualArenas, total: int, floor: int, cap: int) -> None:
        self.budget = MemoryBudget(total)
        self.share = self.budget.open("kv", floor, cap)
        self.adapters = self.budget.open("adapters", 0, total - floor)
        sizes = [BLOCK * HEADS * DIM * 4] * 2
        layout = Layout.of(cap, BLOCK, sizes, arenas.page_bytes)
        assert layout is not None
        self.layout = layout
        self.memory = SharedKVMemory(layout, torch.float32, self.share, arenas, PageWork.run)
        self.tensors = [self.memory.tensor(HEADS, DIM) for _ in range(2)]
        self.pool = BlockPool(layout.num_blocks, self.memory)
        self.share.idle = IdleBlocks(self.pool, layout.extent_bytes)

    def check(self, held: list[int]) -> None:
        self.budget.check()
        self.pool.check(dict.fromkeys(held, 1))

    def write(self, blocks: list[int]) -> None:
        for tensor in self.tensors:
            tensor[blocks] = torch.tensor(blocks, dtype=torch.float32).view(-1, 1, 1, 1)

    def is_written(self, blocks: list[int]) -> bool:
        return all(bool((tensor[block] == block).all()) for tensor in self.tensors for block in blocks)


def setup_on_host(floor: int = 16, cap: int = 64) -> Setup:
    return Setup(host_arenas(), 80 * PAGE, floor * PAGE, cap * PAGE)


def test_an_extent_is_a_page_in_each_tensor_and_only_those_in_use_are_there() -> None:
    it = setup_on_host()
    assert (it.layout.extent_blocks, it.layout.extent_bytes, it.layout.num_blocks) == (8, 2 * PAGE, 256)
    blocks = it.pool.take(9)
    it.write(blocks)
    assert it.share.used == 2 * 2 * PAGE and it.is_written(blocks)
    for block in blocks:
        it.pool.release(block)
    it.check([])
    it.pool.give_up()
    assert it.share.used == 2 * PAGE
    it.check([])


def test_blocks_are_free_as_far_as_adapters_leave_memory() -> None:
    it = setup_on_host()
    assert it.pool.num_free == it.pool.num_within_reach == 256  # all that the cap allows
    it.adapters.take(40 * PAGE)
    assert it.pool.num_free == 20 * 8
    it.adapters.take(24 * PAGE)
    assert it.pool.num_free == 8 * 8 and not it.pool.make_ready(65)
    assert len(it.pool.take(64)) == 64 and it.share.used == it.share.floor
    it.adapters.give_back(30 * PAGE)
    assert it.pool.num_free == 15 * 8


def test_adapters_get_what_nobody_holds_and_what_remembers_nothing_goes_first() -> None:
    it = setup_on_host()
    blocks = it.pool.take(256)
    it.pool.now = 7.0
    for block in blocks[:128]:
        if block >= 8:
            it.pool.remember(block, block.to_bytes(4, "big"))
        it.pool.release(block)
    it.adapters.take(16 * PAGE)
    assert it.adapters.free == 0 and it.adapters.within_reach == 32 * PAGE
    assert it.adapters.others_unused_since() == float("-inf")
    assert it.adapters.ask_others(0.0), "one extent remembers nothing"
    assert it.adapters.others_unused_since() == 7.0 and not it.adapters.ask_others(6.9)
    assert it.adapters.make_room(32 * PAGE, 7.0) and it.adapters.free == 32 * PAGE
    assert it.pool.find((8).to_bytes(4, "big")) is None
    it.adapters.take(32 * PAGE)
    assert it.pool.num_free == 0
    it.check(blocks[128:])


def test_what_is_cached_stays_while_an_adapter_that_was_used_later_would_have_to_go() -> None:
    """Growth that only serves the cache of prefixes takes nothing from who used it since."""

    class Adapter:
        gave_up = 0

        def num_bytes(self) -> int:
            return it.adapters.used

        def unused_since(self) -> float | None:
            return 5.0 if it.adapters.used else None

        def give_up(self) -> None:
            self.gave_up += 1
            it.adapters.give_back(it.adapters.used)

    it, adapter = setup_on_host(floor=16), Adapter()
    it.adapters.idle = adapter
    it.adapters.take(64 * PAGE)  # the blocks have their floor: 64, which is as much as is worth holding
    it.pool._num_worth_holding = 256
    for at in (4.0, 6.0):
        it.pool.now = at
        for block in it.pool.take(64):
            it.pool.remember(block, block.to_bytes(4, "big") + bytes([int(at)]))
            it.pool.release(block)
        assert adapter.gave_up == 0
    it.pool.take(1)  # in place of a prefix that was used at 6, after the adapter
    assert adapter.gave_up == 1
    it.pool.take(63)
    assert it.pool.take(100)
    assert adapter.gave_up == 1


@pytest.mark.parametrize("seed", range(20))
def test_whatever_comes_and_goes_the_account_is_exact_and_blocks_keep_what_was_written(seed: int) -> None:
    rng, it = random.Random(seed), setup_on_host()
    held: list[int] = []
    adapters = 0
    for step in range(150):
        it.pool.now = float(step)
        match rng.randrange(4):
            case 0:
                count = rng.randrange(40)
                if count <= it.pool.num_free:
                    blocks = it.pool.take(count)
                    it.write(blocks)
                    held += blocks
            case 1:
                rng.shuffle(held)
                for block in held[: rng.randrange(40)]:
                    if rng.random() < 0.5 and it.pool._hash_of[block] is None:
                        it.pool.remember(block, rng.randbytes(4))
                    it.pool.release(block)
                    held.remove(block)
            case 2:
                wanted = rng.randrange(20) * PAGE
                if it.adapters.make_room(wanted, float("inf")):
                    it.adapters.take(wanted)
                    adapters += wanted
            case 3:
                left = rng.randint(0, adapters // PAGE) * PAGE
                it.adapters.give_back(left)
                adapters -= left
        it.check(held)
        assert it.is_written(held)


def test_a_gpu_that_is_full_keeps_what_it_has() -> None:
    driver = FakeBindings(40 * GRANULE)
    arenas = VirtualArenas(CudaPages(CudaDriver(driver, 0), CPU, 4, FakeCuda()))
    it = Setup(arenas, 80 * GRANULE, 16 * GRANULE, 64 * GRANULE)
    blocks = it.pool.take(it.layout.extent_blocks * 20)  # 40 granules: all of the fake device
    assert it.pool.num_free == it.layout.extent_blocks * 12
    assert not it.pool.make_ready(1) and it.pool.num_free == 0
    it.check(blocks)
    for block in blocks:
        it.pool.release(block)
    it.pool.give_up()
    assert len(driver.mapped) == 38
    assert it.pool.make_ready(it.layout.extent_blocks * 19)


def test_where_there_is_too_little_to_share_all_of_it_is_there() -> None:
    assert Layout.of(15 * 2 * PAGE, BLOCK, [512, 512], PAGE) is None
    memory = WholeKVMemory(5, BLOCK, torch.float32, CPU)
    assert memory.tensor(HEADS, DIM).shape == (5, BLOCK, HEADS, DIM)
    assert len(BlockPool(5, memory).take(5)) == 5


def test_tensors_whose_blocks_end_within_pages_share_them() -> None:
    layout = Layout.of(1 << 20, BLOCK, [1300], PAGE)
    assert layout is not None and layout.extent_blocks == 4 and layout.extent_bytes == 3 * PAGE


def test_huge_pages_begin_where_they_may() -> None:
    pages = HostPages(HUGE_PAGE_BYTES)
    for _ in range(3):
        address = pages.reserve(4 * HUGE_PAGE_BYTES)
        assert address % HUGE_PAGE_BYTES == 0
        pages.map(address, HUGE_PAGE_BYTES)
        pages.unmap(address, HUGE_PAGE_BYTES)
        pages.release(address, 4 * HUGE_PAGE_BYTES)


def test_memory_that_is_given_back_faults_no_more_when_it_is_taken_again() -> None:
    it = setup_on_host()
    (block,) = it.pool.take(1)
    it.write([block])
    it.pool.release(block)
    it.pool.give_up()
    assert it.share.used == 0
    assert it.pool.take(1) == [block] and float(it.tensors[0][block].abs().max()) == 0.0


def test_page_work_that_fails_is_undone() -> None:
    class Refusing(HostPages):
        fails = False

        def map(self, address: int, num_bytes: int) -> None:
            if self.fails:
                raise ArenaError("no memory")
            super().map(address, num_bytes)

    pages = Refusing()
    it = Setup(VirtualArenas(pages), 80 * PAGE, 16 * PAGE, 64 * PAGE)
    it.pool.take(8)
    pages.fails = True
    assert not it.pool.make_ready(1) and it.share.used == 2 * PAGE
    it.check(list(range(8)))
