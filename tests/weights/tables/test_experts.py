"""Stacks with room behind the base's experts, and the map that sends tokens there."""

import random
from collections.abc import Sequence

import pytest
import torch

from adapters_store.parts import ExpertReplacement, TensorRef
from kernels.adapter_rows import ShapeKey
from server.weights.arena import ArenaError
from server.weights.host_arena import host_arenas
from server.weights.page_pool import own_pool
from server.weights.tables.experts import ExpertTable

HIDDEN, INNER, BASE = 40, 12, 5


def parts(tuned: dict[int, Sequence[int]], split: bool = True) -> list[ExpertReplacement]:
    def ref(key: str, *shape: int) -> TensorRef:
        return TensorRef("file", key, shape, "F32")

    halves = ("gate", "up") if split else ("gate_up",)
    rows = INNER if split else 2 * INNER
    return [
        ExpertReplacement(layer, expert, tuple(ref(f"{layer}.{expert}.{half}", rows, HIDDEN) for half in halves),
                          ref(f"{layer}.{expert}.down", HIDDEN, INNER))
        for layer, experts in tuned.items() for expert in experts
    ]  # fmt: skip


class Layers:
    """A table with two layers, and what the model was given of each."""

    def __init__(self, e_max: int = 3, pages: int = 1000) -> None:
        arenas = host_arenas()
        self.pool = own_pool(pages * arenas.page_bytes, arenas.page_bytes)
        self.table = ExpertTable(2, e_max, self.pool, arenas)
        self.base = {
            layer: (torch.randn(BASE, 2 * INNER, HIDDEN), torch.randn(BASE, HIDDEN, INNER)) for layer in (1, 4)
        }
        self.made = {layer: self.table.add_layer(layer, *base) for layer, base in self.base.items()}


@pytest.mark.parametrize("split", [True, False])
def test_an_adapters_experts_lie_behind_the_bases_and_the_map_leads_there_once_installed(split: bool) -> None:
    it = Layers()
    tuned = {1: [3, 0], 4: [2]}
    for slot in (1, 2):
        it.table.map(slot, it.table.layout(parts(tuned, split)))
        for number, (ref, place) in enumerate(it.table.prepare(slot).places, start=1):
            assert place.shape == ref.shape
            place.fill_(slot * 100 + number)
        assert all((expert_map[slot] == expert_map[0]).all() for _, _, expert_map in it.made.values())
        it.table.install(slot)
        assert it.table.has(slot) and it.table.shape_key(slot) == ShapeKey(experts=1)
        it.table.check()
    for layer, (gate_up, down, expert_map) in it.made.items():
        assert torch.equal(gate_up[:BASE], it.base[layer][0]) and torch.equal(down[:BASE], it.base[layer][1])
        assert expert_map[0].tolist() == list(range(BASE))
        for slot in (1, 2):
            for expert in range(BASE):
                place = int(expert_map[slot, expert])
                assert (place >= BASE) == (expert in tuned[layer])
                if place >= BASE:
                    values = {*gate_up[place].unique().tolist(), *down[place].unique().tolist()}
                    assert len(values) == (3 if split else 2) and {value // 100 for value in values} == {slot}
    used = it.pool.num_used
    it.table.unmap(1)
    assert it.table.shape_key(1) == ShapeKey() and 0 < it.pool.num_used < used
    assert all((expert_map[1] == expert_map[0]).all() and (expert_map[2] != expert_map[0]).any()
               for _, _, expert_map in it.made.values())  # fmt: skip
    it.table.unmap(2)
    assert it.pool.num_used == it.table.num_mapped_pages == 0
    it.table.check()


def test_more_than_a_slot_has_places_for_is_refused_with_the_numbers() -> None:
    it = Layers(e_max=2)
    assert it.table.layout(parts({1: [0, 1], 4: [2]})).refusal is None
    assert (
        it.table.layout(parts({1: [0], 4: [2, 3, 4]})).refusal == "it tunes 3 experts of layer 4; there is room for 2"
    )


@pytest.mark.parametrize("fails_at", range(4))
def test_a_stack_that_cannot_be_mapped_undoes_those_before_it(fails_at: int) -> None:
    it = Layers()
    stacks = [stack for layer in it.table._layers.values() for stack in layer.stacks]

    def fail(offset: int, size: int) -> int:
        raise ArenaError("out of memory")

    arena = stacks[fails_at].arena
    works, arena.map = arena.map, fail  # type: ignore[method-assign]
    with pytest.raises(ArenaError, match="out of memory"):
        it.table.map(1, it.table.layout(parts({1: [0, 4], 4: [1]})))
    arena.map = works  # type: ignore[method-assign]
    assert not it.table.has(1) and it.pool.num_used == it.table.num_mapped_pages == 0
    it.table.check()
    it.table.map(1, it.table.layout(parts({1: [0, 4], 4: [1]})))  # nothing is left that would be in the way
    it.table.check()


def test_what_pages_for_says_is_what_map_takes() -> None:
    it = Layers()
    for slot, tuned in ((1, {1: [0, 1, 2]}), (2, {1: [4], 4: [0, 3]})):
        layout = it.table.layout(parts(tuned))
        wanted, before = it.table.pages_for(layout), it.pool.num_used
        it.table.map(slot, layout)
        assert it.pool.num_used - before == wanted > 0


def test_random_orders_of_mapping_preparing_installing_and_unmapping_leave_nothing_behind() -> None:
    rng, it = random.Random(4), Layers()
    state = dict.fromkeys((1, 2), "absent")
    for _ in range(400):
        slot = rng.choice((1, 2))
        match state[slot], rng.random() < 0.3:
            case "absent", _:
                tuned = {
                    layer: rng.sample(range(BASE), rng.randrange(1, 4)) for layer in rng.choice([(1,), (4,), (1, 4)])
                }
                it.table.map(slot, it.table.layout(parts(tuned)))
                state[slot] = "mapped"
            case "mapped", False:
                prepared = it.table.prepare(slot)
                for number, tensor in enumerate(prepared.checked):
                    tensor.fill_(number)
                assert all(place.isfinite().all() for _, place in prepared.places)  # what is checked is what is filled
                state[slot] = "prepared"
            case "prepared", False:
                it.table.install(slot)
                assert all(
                    {expert for expert, place in enumerate(it.made[layer][2][slot].tolist()) if place >= BASE}
                    == set(tuned)
                    for layer, tuned in it.table._held[slot].layout.tuned.items()
                )
                state[slot] = "installed"
            case _:
                it.table.unmap(slot)
                state[slot] = "absent"
        it.table.check()
        for _, _, expert_map in it.made.values():
            assert all(state[slot] == "installed" or torch.equal(expert_map[slot], expert_map[0]) for slot in (1, 2))
    for slot, its in state.items():
        if its != "absent":
            it.table.unmap(slot)
    assert it.pool.num_used == it.table.num_mapped_pages == 0
