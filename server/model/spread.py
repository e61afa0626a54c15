"""Some tokens, spread over a long sequence's positions without the sequence.

A token at position p attends to p + 1 keys. Block tables say where those lie, and nothing forbids that a block stands
in a table again and again: so a few tokens are all there is in the cache, and each is seen as often as its block is
listed. Two halves of the blocks take turns: a table lists one half for the older part of its sequence, and the other
for the newer part, where its own tokens are stored. A window of the wrong length then shows as another mixture of both.

Example, blocks of 2 tokens and halves of 2 blocks [0 1] and [2 3]: the token at position 13 is stored in its table's
last block, and sees what is in the first half six times and what is in the second eight times.

    block table  [0 1 0 2 3 2 3]
    positions     0 ..       13
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.model.masks import LayerMask

_HALF = 16  # tokens, or a block if that is more
_AT_START, _AT_END = 8, 4  # consecutive tokens of one sequence; the others are alone in theirs
_AT_ONCE = 1 << 20  # keys


@dataclass(frozen=True)
class Run:
    """Consecutive tokens of one sequence, from position `start` on. rows: theirs among all tokens."""

    start: int
    rows: range
    half: int  # where they are stored

    @property
    def end(self) -> int:
        return self.start + len(self.rows)


class Spread:
    """Where tokens are, and what is where they look."""

    def __init__(self, length: int, block_size: int) -> None:
        """length: of the longest sequence."""
        self.block_size = block_size
        self._half = -(-_HALF // block_size) * block_size
        self.num_blocks = 2 * self._half // block_size
        self.runs = self._runs(length)
        self.positions = [run.start + index for run in self.runs for index in range(len(run.rows))]
        slots = [self._slot(run.half, position) for run in self.runs for position in range(run.start, run.end)]
        self._rows = torch.full((2 * self._half,), -1)
        self._rows[torch.tensor(slots)] = torch.arange(len(slots))

    def __len__(self) -> int:
        return len(self.positions)

    def table(self, run: Run, blocks: Sequence[int]) -> list[int]:
        """The block table of its sequence, where these are the blocks that there are."""
        per_half = len(blocks) // 2
        halves = [blocks[:per_half], blocks[per_half:]]
        turn = self._turn(run)
        return [
            halves[run.half if index >= turn else 1 - run.half][index % per_half]
            for index in range(-(-run.end // self.block_size))
        ]

    def counts(self, mask: LayerMask) -> Tensor:
        """[tokens, tokens] how often each (row) sees each (column)."""
        counts = torch.zeros(len(self), len(self))
        for run in self.runs:
            for row, position in zip(run.rows, range(run.start, run.end), strict=True):
                for start in range(0, position + 1, _AT_ONCE):
                    keys = torch.arange(start, min(start + _AT_ONCE, position + 1))
                    seen = keys[mask.seen(position, range(start, start + len(keys))).cpu()]
                    half = torch.where(seen // self.block_size >= self._turn(run), run.half, 1 - run.half)
                    rows = self._rows[half * self._half + seen % self._half]
                    counts[row] += torch.bincount(rows, minlength=len(self))
        return counts

    def _turn(self, run: Run) -> int:
        """Index of the first block of the newer part."""
        return run.start // self.block_size // 2

    def _slot(self, half: int, position: int) -> int:
        return half * self._half + position % self._half

    def _runs(self, length: int) -> list[Run]:
        """One at the start and one at the end; then a token alone for each place that those leave, at positions that
        grow by about the same factor, of either half in turn."""
        places = [(half, offset) for offset in range(min(self._half, length)) for half in (0, 1)]
        random.Random(0).shuffle(places)
        first = (0, 0, min(_AT_START, self._half, length))
        last = (1, max(0, length - _AT_END), min(_AT_END, length))
        taken = {(half, (start + index) % self._half) for half, start, count in (first, last) for index in range(count)}
        left = [place for place in places if place not in taken]
        starts = [first, last]
        for index, (half, offset) in enumerate(left):
            wanted = self._half * math.exp(math.log(max(1.0, length / self._half)) * index / len(left))
            most = (length - 1 - offset) // self._half
            starts.append((half, offset + self._half * min(most, round(wanted / self._half)), 1))
        runs: list[Run] = []
        for half, start, count in starts:
            row = runs[-1].rows.stop if runs else 0
            runs.append(Run(start, range(row, row + count), half))
        return runs
