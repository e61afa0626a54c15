"""The indices of one step's attention, made once and used by every layer."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Decodes are padded to the longest of their group. A group ends where padding would pass a quarter of the work, or
# where its gathered keys outgrow a core's cache: groups of 16 take twice as long as groups of 4 (benchmarks/README.md)
MAX_GROUP = 4
MAX_PADDING = 0.25


@dataclass(frozen=True)
class PrefillChunk:
    """One sequence with several new tokens. rows: its [start, end) in the step; mask [q, keys], added to scores."""

    start: int
    end: int
    blocks: Tensor
    num_keys: int
    mask: Tensor


@dataclass(frozen=True)
class DecodeGroup:
    """Sequences with one new token each, of similar length.

    rows [n]: their tokens in the step. blocks [n * b]: their blocks, the last one repeated as padding: a mask does not
    stop NaN or infinity, so a sequence never reads another's block.
    mask [n, 1, 1, b * block_size], added to scores.
    """

    rows: Tensor
    blocks: Tensor
    mask: Tensor


@dataclass(frozen=True)
class _Sequence:
    start: int  # row of its first new token
    query_len: int
    kv_len: int  # keys after this step; the new tokens are the last of them
    block_table: list[int]


class AttentionBatch:
    """Sequences of one step, with their lengths and block tables.

    Running example, block size 4: sequence 0 decodes its 6th token, sequence 1 prefills tokens 3 to 5 of 5.
        query_lens   [1, 3]          rows of the step: [0] and [1, 2, 3]
        kv_lens      [6, 5]
        block_tables [[9, 2], [4, 7]]
    """

    def __init__(
        self,
        query_lens: list[int],
        kv_lens: list[int],
        block_tables: list[list[int]],
        block_size: int,
        dtype: torch.dtype,
    ) -> None:
        self.block_size = block_size
        self._dtype = dtype
        self._sequences: list[_Sequence] = []
        start = 0
        for query_len, kv_len, block_table in zip(query_lens, kv_lens, block_tables, strict=True):
            self._sequences.append(_Sequence(start, query_len, kv_len, block_table))
            start += query_len
        self._plans: dict[int | None, tuple[list[PrefillChunk], list[DecodeGroup]]] = {}

    def plan(self, window: int | None) -> tuple[list[PrefillChunk], list[DecodeGroup]]:
        """Prefill chunks and decode groups for layers with this sliding window (None: full attention)."""
        if window not in self._plans:
            chunks = [self._chunk(sequence, window) for sequence in self._sequences if sequence.query_len > 1]
            decodes = [sequence for sequence in self._sequences if sequence.query_len == 1]
            self._plans[window] = chunks, self._groups(decodes, window)
        return self._plans[window]

    def _visible(self, sequence: _Sequence, window: int | None) -> tuple[list[int], int]:
        """Blocks that hold what the sequence's new tokens may see, and the position of their first key."""
        first_query = sequence.kv_len - sequence.query_len
        first_key = max(0, first_query - window + 1) if window is not None else 0
        skipped = first_key // self.block_size
        last = -(-sequence.kv_len // self.block_size)
        return sequence.block_table[skipped:last], skipped * self.block_size

    def _chunk(self, sequence: _Sequence, window: int | None) -> PrefillChunk:
        blocks, first_key = self._visible(sequence, window)
        num_keys = sequence.kv_len - first_key
        query = torch.arange(sequence.kv_len - sequence.query_len, sequence.kv_len)[:, None]
        key = torch.arange(first_key, sequence.kv_len)[None]
        end = sequence.start + sequence.query_len
        return PrefillChunk(
            sequence.start, end, torch.tensor(blocks), num_keys, self._mask(query, key, window, sequence.kv_len)
        )

    def _groups(self, decodes: list[_Sequence], window: int | None) -> list[DecodeGroup]:
        seen = sorted(
            ((self._visible(sequence, window), sequence) for sequence in decodes), key=lambda it: len(it[0][0])
        )
        groups: list[DecodeGroup] = []
        while seen:
            longest = len(seen[-1][0][0])
            count, used = 0, 0
            for (blocks, _), _sequence in reversed(seen):
                padding = longest * (count + 1) - (used + len(blocks))
                if count == MAX_GROUP or padding > MAX_PADDING * longest * (count + 1):
                    break
                count, used = count + 1, used + len(blocks)
            groups.append(self._group(seen[-count:], longest, window))
            del seen[-count:]
        return groups

    def _group(
        self, members: list[tuple[tuple[list[int], int], _Sequence]], width: int, window: int | None
    ) -> DecodeGroup:
        rows = torch.tensor([sequence.start for _, sequence in members])
        blocks = torch.tensor([blocks + blocks[-1:] * (width - len(blocks)) for (blocks, _), _ in members])
        kv_lens = torch.tensor([[sequence.kv_len] for _, sequence in members])
        first_keys = torch.tensor([[first_key] for (_, first_key), _ in members])
        key = first_keys + torch.arange(width * self.block_size)
        mask = self._mask(kv_lens - 1, key, window, kv_lens)
        return DecodeGroup(rows, blocks.flatten(), mask[:, None, None])

    def _mask(self, query: Tensor, key: Tensor, window: int | None, kv_len: Tensor | int) -> Tensor:
        seen = (key <= query) & (key < kv_len)
        if window is not None:
            seen &= key > query - window
        return torch.zeros(seen.shape, dtype=self._dtype).masked_fill_(~seen, float("-inf"))
