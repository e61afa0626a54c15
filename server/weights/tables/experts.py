"""Replaced experts on the device: stacks with room behind the base's experts, and the expert maps."""

from collections.abc import Sequence
from math import gcd, lcm

import torch
from torch import Tensor

from adapters_store.parts import ExpertReplacement, TensorRef
from kernels.adapter_rows import ShapeKey
from server.weights.arena import ArenaError, Arenas
from server.weights.page_pool import PagePool
from server.weights.tables.table import Mapped, to_device


class _Stack:
    """One matrix of one layer: [M + slots * E_max, ...] in an arena, of which the base's M are always mapped.

    E_max is the same in both stacks of a layer. The base's experts end, and every slot begins, at the start of a page,
    so an adapter leaves at most the rest of its last page unused.
    """

    def __init__(self, base: Tensor, num_slots: int, e_max: int, arenas: Arenas, pool: PagePool) -> None:
        self._num_base, self._e_max = len(base), e_max
        total = len(base) + num_slots * e_max
        self._expert_bytes = base[0].numel() * base.itemsize
        self._begin = -len(base) * self._expert_bytes % arenas.page_bytes
        self.base_range = (self._begin, len(base) * self._expert_bytes)
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


class ExpertTable:
    """The adapter in slot s keeps its experts of a layer at M + (s - 1) * E_max + δ, δ counting them by id.

    E_max is the same in all layers; 0 means as many as the base has. The rest of its places stay unmapped, so it
    occupies its tuned experts and less than a page a tensor.
    """

    kind = ExpertReplacement

    def __init__(self, num_slots: int, e_max: int, pool: PagePool, arenas: Arenas) -> None:
        self._num_slots, self.e_max, self._pool, self._arenas = num_slots, e_max, pool, arenas
        self._layers: dict[int, _Layer] = {}
        self._tuned: dict[int, dict[int, list[int]]] = {}  # slot -> layer -> expert ids, ascending

    def add_layer(self, layer: int, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take over the base's experts of a layer; returns the stacks that replace them, and the expert map.

        The map [slots + 1, M] int32 says which expert a slot uses instead of each of the base's; row 0 is the identity.
        """
        self.e_max = self.e_max or len(gate_up)
        # addresses cost nothing, so a slot's range is rounded up until every slot begins on a page
        aligned = lcm(*(_experts_to_a_page_boundary(stack, self._arenas.page_bytes) for stack in (gate_up, down)))
        places = -(-self.e_max // aligned) * aligned
        first = _Stack(gate_up, self._num_slots, places, self._arenas, self._pool)
        second = _Stack(down, self._num_slots, places, self._arenas, self._pool)
        self._layers[layer] = _Layer(first, second, len(gate_up), self._num_slots)
        return first.tensor, second.tensor, self._layers[layer].map

    def refusal(self, parts: Sequence[ExpertReplacement]) -> str | None:
        """Beyond E_max lie the next slot's experts."""
        for layer, experts in _by_layer(parts).items():
            if len(experts) > self.e_max:
                return f"it tunes {len(experts)} experts of layer {layer}; there is room for {self.e_max}"
        return None

    def pages_for(self, slot: int, parts: Sequence[ExpertReplacement]) -> int:
        return sum(
            stack.arena.pages_to_map(*stack.range_of(slot, len(experts)))
            for layer, experts in _by_layer(parts).items()
            for stack in self._layers[layer].stacks
        )

    def map(self, slot: int, parts: Sequence[ExpertReplacement]) -> Mapped:
        self._tuned[slot] = tuned = _by_layer(parts)
        mapped: list[tuple[_Stack, int]] = []
        try:
            for layer, experts in tuned.items():
                for stack in self._layers[layer].stacks:
                    self._pool.take(stack.arena.map(*stack.range_of(slot, len(experts))))
                    mapped.append((stack, len(experts)))
        except ArenaError:
            for stack, count in mapped:
                self._pool.give_back(stack.arena.unmap(*stack.range_of(slot, count)))
            del self._tuned[slot]
            raise
        return Mapped([place for part in parts for place in self._places(slot, part)])

    def _places(self, slot: int, part: ExpertReplacement) -> list[tuple[TensorRef, Tensor]]:
        layer = self._layers[part.layer]
        at = layer.gate_up.first(slot) + self._tuned[slot][part.layer].index(part.expert)
        halves = layer.gate_up.tensor[at].split([tensor.shape[0] for tensor in part.gate_up])
        return [*zip(part.gate_up, halves, strict=True), (part.down, layer.down.tensor[at])]

    def install(self, slot: int) -> None:
        for layer_id, experts in self._tuned[slot].items():
            layer = self._layers[layer_id]
            row = list(range(layer.num_base))
            for place, expert in enumerate(experts, start=layer.gate_up.first(slot)):
                row[expert] = place
            to_device(layer.map[slot], row)

    def unmap(self, slot: int) -> None:
        for layer_id, experts in self._tuned.pop(slot).items():
            layer = self._layers[layer_id]
            layer.map[slot] = layer.map[0]
            for stack in layer.stacks:
                self._pool.give_back(stack.arena.unmap(*stack.range_of(slot, len(experts))))

    def has(self, slot: int) -> bool:
        return slot in self._tuned

    def shape_key(self, slot: int) -> ShapeKey:
        return ShapeKey(experts=int(self.has(slot)))

    def check(self) -> None:
        for layer_id, layer in self._layers.items():
            for stack in layer.stacks:
                mine = [
                    stack.range_of(slot, len(tuned[layer_id]))
                    for slot, tuned in self._tuned.items()
                    if layer_id in tuned
                ]
                stack.arena.check([stack.base_range, *mine])
            assert layer.map[0].tolist() == list(range(layer.num_base))

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
