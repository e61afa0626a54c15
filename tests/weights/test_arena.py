"""Arenas over the host's pages: what a mapping costs, what neighbours share, what faults."""

import mmap
import random
from collections.abc import Iterator

import pytest
import torch

from server.weights.arena import ArenaError, VirtualArena
from server.weights.host_arena import HostPages
from tests.support.process_memory import resident_bytes, touches_unmapped

PAGE = mmap.PAGESIZE


@pytest.fixture
def arena() -> Iterator[VirtualArena]:
    arena = VirtualArena(1 << 40, HostPages())  # a TiB of addresses
    yield arena
    arena.close()


def test_a_reservation_costs_no_memory_and_a_map_costs_its_pages(arena: VirtualArena) -> None:
    before = resident_bytes()
    assert arena.map(7 * PAGE, 1000 * PAGE) == 1000
    assert resident_bytes() - before < 20 * PAGE  # mapped, not yet written
    arena.tensor(7 * PAGE, (1000 * PAGE,), torch.uint8).fill_(1)
    assert abs(resident_bytes() - before - 1000 * PAGE) < 20 * PAGE
    assert arena.unmap(7 * PAGE, 1000 * PAGE) == 1000
    assert resident_bytes() - before < 20 * PAGE


def test_neighbours_share_their_edge_page(arena: VirtualArena) -> None:
    half = PAGE + PAGE // 2
    assert arena.pages_to_map(0, half) == 2
    assert arena.map(0, half) == 2
    assert arena.map(half, half) == 1  # the page in the middle is there already
    arena.tensor(half, (4,), torch.uint8).fill_(9)
    assert arena.unmap(0, half) == 1
    assert arena.tensor(half, (4,), torch.uint8).tolist() == [9] * 4  # its neighbour's going changed nothing
    assert touches_unmapped(arena, 0) and not touches_unmapped(arena, half)
    arena.check([(half, half)])
    assert arena.unmap(half, half) == 2
    arena.map(half, half)
    assert arena.tensor(half, (4,), torch.uint8).tolist() == [0] * 4  # memory comes back clean


def test_random_ranges_keep_their_pages_and_contents(arena: VirtualArena) -> None:
    rng = random.Random(3)
    live: dict[int, tuple[int, int]] = {}
    for step in range(400):
        if live and rng.random() < 0.45:
            slot = rng.choice(list(live))
            offset, size = live.pop(slot)
            assert (arena.tensor(offset, (size,), torch.uint8) == slot % 251).all()
            arena.unmap(offset, size)
        else:
            slot = rng.choice([slot for slot in range(64) if slot not in live])
            offset, size = slot * 3 * PAGE // 2, rng.randrange(1, 3 * PAGE // 2)
            arena.map(offset, size)
            arena.tensor(offset, (size,), torch.uint8).fill_(slot % 251)
            live[slot] = offset, size
        if step % 20 == 0:
            arena.check(list(live.values()))
    assert arena.num_mapped_pages > 0


def test_more_addresses_than_there_are_is_a_clear_error() -> None:
    with pytest.raises(ArenaError, match="cannot reserve 1024.00 TiB"):
        VirtualArena(1 << 50, HostPages())
