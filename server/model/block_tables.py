"""Block tables of the sequences that take part in steps, on the device: the host sends what came to them."""

from collections.abc import Sequence

import numpy as np
import torch

from server.model.inputs import Integers, integers


class Changes:
    """What is to be written before a step: runs (seat, first column, count, where among the blocks), and the blocks."""

    def __init__(self) -> None:
        self.runs: list[tuple[int, int, int, int]] = []
        self.blocks: list[int] = []

    def add(self, seat: int, column: int, blocks: Sequence[int]) -> None:
        self.runs.append((seat, column, len(blocks), len(self.blocks)))
        self.blocks += blocks


class BlockTables:
    """A row ("seat") of a table on the device for each block table that was seen lately.

    A block table only ever grows; when a lane gives up its blocks it begins another list. So a list that was seen
    before is known but for what came to its end, and it is told by which list it is.
    """

    def __init__(self, seats: int, columns: int, device: torch.device) -> None:
        """seats: at least as many as a step has sequences."""
        self.on_device = torch.zeros(seats, columns, dtype=torch.int32, device=device)
        self._free = list(range(seats))
        self._seats: dict[int, int] = {}  # by id of the list
        self._lists: dict[int, Sequence[int]] = {}  # by seat: as long as it is held, no other list has its id
        self._sent = [0] * seats  # blocks that the device knows

    def seat(self, tables: Sequence[Sequence[int]]) -> tuple[Integers, Changes]:
        """The seat of each, and what the device does not know of them yet."""
        seats, sent, changes = [], self._sent, Changes()
        for table in tables:
            seat = self._seats.get(id(table))
            if seat is None:
                seat = self._take(table, tables)
            if len(table) != sent[seat]:
                changes.add(seat, sent[seat], table[sent[seat] :])
                sent[seat] = len(table)
            seats.append(seat)
        return integers(seats), changes

    def _take(self, table: Sequence[int], others: Sequence[Sequence[int]]) -> int:
        if not self._free:
            self._forget_all_but(others)
        seat = self._free.pop()
        self._seats[id(table)], self._lists[seat], self._sent[seat] = seat, table, 0
        return seat

    def _forget_all_but(self, tables: Sequence[Sequence[int]]) -> None:
        kept = {id(it) for it in tables}
        for which, seat in list(self._seats.items()):
            if which not in kept:
                del self._seats[which], self._lists[seat]
                self._free.append(seat)


def as_runs(changes: Changes) -> Integers:
    """[4 * runs]"""
    return np.array(changes.runs, np.int32).reshape(-1)
