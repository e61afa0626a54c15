"""Replaced experts on the device: stacks with room behind the base's experts, and the expert maps."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import gcd, lcm

import torch
from torch import Tensor

from adapters_store.parts import ExpertReplacement
from kernels.adapter_rows import ShapeKey
from server.weights.arena import ArenaError, Arenas
from server.weights.pace import unhurried
from server.weights.page_pool import PagePool
from server.weights.tables.table import Place, Prepared, on_host


class _Stack:
    """One matrix of one layer: [M + slots * E_max, ...] in an arena, of which the base's M are always mapped, the last
    `shared` of which are left to be written.

    E_max is the same in both stacks of a layer. The base's experts end, and every slot begins, at the start of a page,
    so an adapter leaves at most the rest of its last page unused.
    """

    def __init__(self, base: Tensor, shared: int, num_slots: int, e_max: int, arenas: Arenas, pool: PagePool) -> None:
        self._num_base, self._e_max = len(base) + shared, e_max
        total = self._num_base + num_slots * e_max
        self._expert_bytes = base[0].numel() * base.itemsize
        self._begin = -self._num_base * self._expert_bytes % arenas.page_bytes
        self.base_range = (self._begin, self._num_base * self._expert_bytes)
        self.arena = arenas.stack(self._begin + total * self._expert_bytes, sum(self.base_range), pool)
        self.arena.map(*self.base_range)
        self.tensor = self.arena.tensor(self._begin, (total, *base.shape[1:]), base.dtype)
        self.tensor[: len(base)].copy_(base)

    def first(self, slot: int) -> int:
        """Where the experts of the adapter in `slot` begin."""
        return self._num_base + (slot - 1) * self._e_max

    def range_of(self, slot: int, count: int) -> tuple[int, int]:
        """(offset, size) in bytes of that adapter's first `count` experts."""
        return self._begin + self.first(slot) * self._expert_bytes, count * self._expert_bytes


class _Layer:
    def __init__(self, gate_up: _Stack, down: _Stack, num_base: int, num_slots: int) -> None:
        self.stacks = (gate_up, down)
        self.gate_up, self.down = gate_up, down
        self.num_base = num_base
        identity = torch.arange(num_base, dtype=torch.int32, device=gate_up.tensor.device)
        self.map = identity.repeat(num_slots + 1, 1)  # [slots + 1, M]
        self.identity = self.map[0]


@dataclass(frozen=True)
class ExpertLayout:
    """As table.Layout."""

    parts: Sequence[ExpertReplacement]
    tuned: dict[int, list[int]]  # layer -> expert ids, ascending
    refusal: str | None


@dataclass
class _Held:
    """One adapter, and what `prepare` made for `install`: rows of expert maps, and what becomes of them."""

    layout: ExpertLayout
    rows: list[Tensor] = field(default_factory=list)  # of the maps, where kernels read them
    values: list[Tensor] = field(default_factory=list)  # on the host
    identities: list[Tensor] = field(default_factory=list)
    is_installed: bool = False


class ExpertTable:
    """The adapter in slot s keeps its experts of a layer at M + (s - 1) * E_max + δ, δ counting them by id.

    E_max is the same in all layers; 0 means as many as the base has. The rest of its places stay unmapped, so it
    occupies its tuned experts and less than a page a tensor.
    """

    kind = ExpertReplacement

    def __init__(self, num_slots: int, e_max: int, pool: PagePool, arenas: Arenas) -> None:
        self._num_slots, self.e_max, self._pool, self._arenas = num_slots, e_max, pool, arenas
        self._layers: dict[int, _Layer] = {}
        self._held: dict[int, _Held] = {}  # by slot

    def add_layer(
        self, layer: int, gate_up: Tensor, down: Tensor, num_shared: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take over the base's experts of a layer; returns the stacks that replace them, and the expert map.

        The map [slots + 1, M] int32 says which expert a slot uses instead of each of the base's; row 0 is the identity.
        num_shared: of the base's M, how many come behind those given, and are left to be written.
        """
        num_base = len(gate_up) + num_shared
        self.e_max = self.e_max or num_base
        # addresses cost nothing, so a slot's range is rounded up until every slot begins on a page
        aligned = lcm(*(_experts_to_a_page_boundary(stack, self._arenas.page_bytes) for stack in (gate_up, down)))
        places = -(-self.e_max // aligned) * aligned
        first = _Stack(gate_up, num_shared, self._num_slots, places, self._arenas, self._pool)
        second = _Stack(down, num_shared, self._num_slots, places, self._arenas, self._pool)
        self._layers[layer] = _Layer(first, second, num_base, self._num_slots)
        return first.tensor, second.tensor, self._layers[layer].map

    def layout(self, parts: Sequence[ExpertReplacement]) -> ExpertLayout:
        """Beyond E_max lie the next slot's experts."""
        tuned = _by_layer(parts)
        for layer, experts in tuned.items():
            if len(experts) > self.e_max:
                told = f"it tunes {len(experts)} experts of layer {layer}; there is room for {self.e_max}"
                return ExpertLayout(parts, tuned, told)
        return ExpertLayout(parts, tuned, None)

    def pages_for(self, layout: ExpertLayout) -> int:
        return sum(
            stack.arena.pages_of(stack.range_of(1, len(experts))[1])  # every slot begins on a page
            for layer, experts in layout.tuned.items()
            for stack in self._layers[layer].stacks
        )

    def map(self, slot: int, layout: ExpertLayout) -> None:
        mapped: list[tuple[_Stack, int]] = []
        try:
            for layer, experts in layout.tuned.items():
                for stack in self._layers[layer].stacks:
                    self._pool.take(stack.arena.map(*stack.range_of(slot, len(experts))))
                    mapped.append((stack, len(experts)))
        except ArenaError:
            for stack, count in mapped:
                self._pool.give_back(stack.arena.unmap(*stack.range_of(slot, count)))
            raise
        self._held[slot] = _Held(layout)

    def prepare(self, slot: int) -> Prepared:
        held = self._held[slot]
        checked: list[Tensor] = []
        for layer_id, experts in unhurried(held.layout.tuned.items()):
            layer = self._layers[layer_id]
            first = layer.gate_up.first(slot)
            checked += [stack.tensor[first : first + len(experts)] for stack in layer.stacks]
            held.rows.append(layer.map[slot])
            held.identities.append(layer.identity)
            values = on_host((layer.num_base,), like=layer.map)
            values.copy_(torch.arange(layer.num_base))
            values[experts] = torch.arange(first, first + len(experts), dtype=values.dtype)
            held.values.append(values)
        return Prepared(self._places(slot, held.layout), checked=checked)

    def _places(self, slot: int, layout: ExpertLayout) -> Iterator[Place]:
        order = {(layer, it): at for layer, experts in layout.tuned.items() for at, it in enumerate(experts)}
        for part in unhurried(layout.parts):
            layer = self._layers[part.layer]
            at = layer.gate_up.first(slot) + order[part.layer, part.expert]
            halves = layer.gate_up.tensor[at].split([tensor.shape[0] for tensor in part.gate_up])
            yield from zip(part.gate_up, halves, strict=True)
            yield part.down, layer.down.tensor[at]

    def install(self, slot: int) -> None:
        held = self._held[slot]
        torch._foreach_copy_(held.rows, held.values, non_blocking=True)
        held.is_installed = True

    def unmap(self, slot: int) -> None:
        held = self._held.pop(slot)
        if held.is_installed:
            torch._foreach_copy_(held.rows, held.identities)
        for layer_id, experts in held.layout.tuned.items():
            for stack in self._layers[layer_id].stacks:
                self._pool.give_back(stack.arena.unmap(*stack.range_of(slot, len(experts))))

    def has(self, slot: int) -> bool:
        return slot in self._held

    def shape_key(self, slot: int) -> ShapeKey:
        return ShapeKey(experts=int(self.has(slot)))

    def check(self) -> None:
        for layer_id, layer in self._layers.items():
            for stack in layer.stacks:
                mine = [
                    stack.range_of(slot, len(held.layout.tuned[layer_id]))
                    for slot, held in self._held.items()
                    if layer_id in held.layout.tuned
                ]
                stack.arena.check([stack.base_range, *mine])
            shown = [0, *sorted(self._held)]  # most slots are empty, and there may be a thousand
            empty = torch.ones(len(layer.map), dtype=torch.bool)
            empty[shown] = False
            assert layer.map.is_cuda or bool((layer.map[empty] < layer.num_base).all())
            for slot in shown:
                row = layer.map[slot].tolist()
                assert {it for it in row if it >= layer.num_base} == self._places_seen(slot, layer_id)

    def _places_seen(self, slot: int, layer_id: int) -> set[int]:
        """Where the expert map of a layer may lead, beyond the base's experts."""
        held = self._held.get(slot)
        if held is None or not held.is_installed:
            return set()
        first = self._layers[layer_id].gate_up.first(slot)
        return set(range(first, first + len(held.layout.tuned.get(layer_id, []))))

    @property
    def num_mapped_pages(self) -> int:
        """Pages mapped for adapters, beyond those that the base's experts fill."""
        return sum(
            stack.arena.num_mapped_pages - -(-stack.base_range[1] // stack.arena.page_bytes)  # it ends on a page
            for layer in self._layers.values()
            for stack in layer.stacks
        )


def _experts_to_a_page_boundary(stack: Tensor, page_bytes: int) -> int:
    """After how many experts of this size the addresses are a multiple of a page again."""
    return page_bytes // gcd(page_bytes, stack[0].numel() * stack.itemsize)


def _by_layer(parts: Sequence[ExpertReplacement]) -> dict[int, list[int]]:
    tuned: dict[int, list[int]] = {}
    for part in sorted(parts, key=lambda part: (part.layer, part.expert)):
        tuned.setdefault(part.layer, []).append(part.expert)
    return tuned
