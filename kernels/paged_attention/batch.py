"""The indices of one step's attention, made once and used by every layer: for the reference and for the kernel."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Decodes are padded to the longest of their group. A group ends where padding would pass a quarter of the work, or
# where its gathered keys outgrow a core's cache: groups of 16 take twice as long as groups of 4 (benchmarks/README.md)
MAX_GROUP = 4
MAX_PADDING = 0.25

# Each part of a tile whose keys are split over programs needs one; so no launch has more parts than this
NUM_COUNTERS = 4096


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
class DeviceBatch:
    """What the kernel reads: int32 tensors on its device. A captured batch keeps its tensors; their contents change.

    query_starts [S + 1]: rows of sequence s are [query_starts[s], query_starts[s + 1]) of the query; [0, 1, 4] in the
        example of __init__.py.
    kv_lens [S]: keys after this step, the new tokens last. 0 is padding, whose rows of the output become zero.
    block_tables [S, W]: columns past a sequence's length are never read.
    counters [NUM_COUNTERS]: zero before a launch and after it. Launches that may overlap must not share them.
    max_query_len: no sequence has more new tokens. 1 says that all are decodes. It chooses the tile, and more than
        there are is as right.

    A captured batch of n decodes: query_starts = arange(n + 1), max_query_len = 1. One of n rows whoever they belong
    to: as many sequences as there may be, those that are missing without rows, and the largest max_query_len.
    """

    query_starts: Tensor
    kv_lens: Tensor
    block_tables: Tensor
    counters: Tensor
    max_query_len: int


@dataclass(frozen=True)
class _Sequence:
    start: int  # row of its first new token
    query_len: int
    kv_len: int  # keys after this step; the new tokens are the last of them
    block_table: list[int]


@dataclass(frozen=True)
class _Limits:
    """Who sees whom, beyond causality."""

    window: int | None
    chunk: int | None

    def first_key(self, position: int) -> int:
        """The first key that a query at this position sees."""
        first = 0 if self.window is None else max(0, position - self.window + 1)
        return first if self.chunk is None else max(first, position // self.chunk * self.chunk)

    def mask(self, query: Tensor, key: Tensor, kv_len: Tensor | int, dtype: torch.dtype) -> Tensor:
        """0 where a query sees a key, else -inf. Positions that broadcast; key on the last axis."""
        seen = (key <= query) & (key < kv_len)
        if self.window is not None:
            seen &= key > query - self.window
        if self.chunk is not None:
            seen &= key // self.chunk == query // self.chunk
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


Plan = tuple[list[PrefillChunk], list[DecodeGroup]]


class AttentionBatch:
    """What the reference reads: the sequences of one step, as lists on the host (the example is in __init__.py).

    query_lens: new tokens of each sequence. kv_lens: its keys after this step; 0 if it only pads the batch.
    block_tables: the blocks of each. block_size: in tokens. dtype: of the masks, which are added to scores.
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
        self._plans: dict[tuple[_Limits, torch.device], Plan] = {}

    def plan(self, window: int | None, chunk: int | None = None, device: torch.device | str = "cpu") -> Plan:
        """Prefill chunks and decode groups, on a device, for layers with these limits (None: full attention).

        Sequences without keys are padding and in neither list.
        """
        key = _Limits(window, chunk), torch.device(device)
        if key not in self._plans:
            present = [sequence for sequence in self._sequences if sequence.kv_len]
            chunks = [self._chunk(sequence, *key) for sequence in present if sequence.query_len > 1]
            decodes = [sequence for sequence in present if sequence.query_len == 1]
            self._plans[key] = chunks, self._groups(decodes, *key)
        return self._plans[key]

    def _visible(self, sequence: _Sequence, limits: _Limits) -> tuple[list[int], int]:
        """Blocks that hold what the sequence's new tokens may see, and the position of their first key."""
        skipped = limits.first_key(sequence.kv_len - sequence.query_len) // self.block_size
        last = -(-sequence.kv_len // self.block_size)
        return sequence.block_table[skipped:last], skipped * self.block_size

    def _chunk(self, sequence: _Sequence, limits: _Limits, device: torch.device) -> PrefillChunk:
        blocks, first_key = self._visible(sequence, limits)
        query = torch.arange(sequence.kv_len - sequence.query_len, sequence.kv_len, device=device)[:, None]
        key = torch.arange(first_key, sequence.kv_len, device=device)[None]
        return PrefillChunk(
            start=sequence.start,
            end=sequence.start + sequence.query_len,
            blocks=torch.tensor(blocks, device=device),
            num_keys=sequence.kv_len - first_key,
            mask=limits.mask(query, key, sequence.kv_len, self._dtype),
        )

    def _groups(self, decodes: list[_Sequence], limits: _Limits, device: torch.device) -> list[DecodeGroup]:
        seen = sorted(
            ((self._visible(sequence, limits), sequence) for sequence in decodes), key=lambda it: len(it[0][0])
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
            groups.append(self._group(seen[-count:], longest, limits, device))
            del seen[-count:]
        return groups

    def _group(
        self,
        members: list[tuple[tuple[list[int], int], _Sequence]],
        width: int,
        limits: _Limits,
        device: torch.device,
    ) -> DecodeGroup:
        rows = torch.tensor([sequence.start for _, sequence in members], device=device)
        padded = [blocks + blocks[-1:] * (width - len(blocks)) for (blocks, _), _ in members]
        kv_lens = torch.tensor([[sequence.kv_len] for _, sequence in members], device=device)
        first_keys = torch.tensor([[first_key] for (_, first_key), _ in members], device=device)
        key = first_keys + torch.arange(width * self.block_size, device=device)
        mask = limits.mask(kv_lens - 1, key, kv_lens, self._dtype)
        return DecodeGroup(rows, torch.tensor(padded, device=device).flatten(), mask[:, None, None])
