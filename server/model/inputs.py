"""One step as tensors. Long-lived objects own memory; this one owns indices."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels.lora import LoraWeights, Segment
from kernels.paged_attention import AttentionBatch


class SamplingLike(Protocol):
    temperature: float
    top_p: float
    top_k: int
    seed: int


class RequestLike(Protocol):
    """What a step needs to know of a request."""

    id: int
    tokens: list[int]
    block_table: list[int]
    slot: int

    @property
    def sampling(self) -> SamplingLike: ...

    @property
    def num_generated(self) -> int: ...


class ScheduledLike(Protocol):
    """`num_tokens` tokens of a request are to be computed, from `start` on."""

    @property
    def request(self) -> RequestLike: ...

    @property
    def start(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def samples(self) -> bool: ...


class AdapterTables(Protocol):
    """Where adapters on the device are, as kernels read it. Slot 0 is the base and has no entry."""

    def lora_weights(self, module: str) -> Mapping[int, LoraWeights]:
        """By slot, for one linear."""

    def expert_map(self, layer: int) -> Tensor:
        """[slots + 1, M] int64."""

    def has_lora(self, slot: int) -> bool: ...

    def has_experts(self, slot: int) -> bool: ...


@dataclass(frozen=True)
class StepInputs:
    """Tokens of all requests, flattened; requests in order of adapter slot, so that each adapter is one segment.

    Running example: request a (slot 2) decodes its 6th token, b (base) prefills 3 tokens.
        token_ids   [b b b a]    positions [2 3 4 5]
        segments    [(3, 4, 2)]  sample_segments [(1, 2, 2)]   (of the sampled rows b, a)
        token_slots [0 0 0 2]    or None if no expert adapter takes part
    """

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slot_mapping: Tensor  # [T] int64: where each token's key and value go
    fresh_blocks: Tensor  # int64: KV blocks that come into use with this step
    attention: AttentionBatch
    sample_rows: Tensor  # [R] int64: rows whose logits are wanted
    segments: Sequence[Segment]  # rows of LoRA adapters
    sample_segments: Sequence[Segment]  # the same for the rows of the logits
    token_slots: Tensor | None  # [T] int64
    tables: AdapterTables


class CurrentStep:
    """Where injected modules find the step being computed. One for each loaded model; steps do not nest."""

    def __init__(self) -> None:
        self._inputs: StepInputs | None = None

    @property
    def inputs(self) -> StepInputs:
        assert self._inputs is not None, "the model was called outside a step"
        return self._inputs

    @contextmanager
    def of(self, inputs: StepInputs) -> Iterator[None]:
        assert self._inputs is None, "steps do not nest"
        self._inputs = inputs
        try:
            yield
        finally:
            self._inputs = None


def build_inputs(
    plan: Sequence[ScheduledLike], tables: AdapterTables, block_size: int, dtype: torch.dtype
) -> StepInputs:
    """`plan` is in order of adapter slot. `dtype` is that of attention scores' masks."""
    token_ids: list[int] = []
    positions: list[int] = []
    slot_mapping: list[int] = []
    sample_rows: list[int] = []
    row_slots: list[tuple[int, int]] = []  # (adapter slot, rows) in order
    sample_slots: list[tuple[int, int]] = []
    for scheduled in plan:
        request, start, end = scheduled.request, scheduled.start, scheduled.start + scheduled.num_tokens
        token_ids += request.tokens[start:end]
        positions += range(start, end)
        table = request.block_table
        slot_mapping += [table[p // block_size] * block_size + p % block_size for p in range(start, end)]
        row_slots.append((request.slot, scheduled.num_tokens))
        if scheduled.samples:
            sample_rows.append(len(token_ids) - 1)
            sample_slots.append((request.slot, 1))
    attention = AttentionBatch(
        [scheduled.num_tokens for scheduled in plan],
        [scheduled.start + scheduled.num_tokens for scheduled in plan],
        [scheduled.request.block_table for scheduled in plan],
        block_size,
        dtype,
    )
    token_slots = None
    if any(tables.has_experts(slot) for slot, _ in row_slots):
        adapter_slots, counts = zip(*row_slots, strict=True)
        token_slots = torch.tensor(adapter_slots).repeat_interleave(torch.tensor(counts))
    slots = torch.tensor(slot_mapping)
    return StepInputs(
        token_ids=torch.tensor(token_ids),
        positions=torch.tensor(positions),
        slot_mapping=slots,
        fresh_blocks=slots[slots % block_size == 0] // block_size,  # a block is taken for the token that begins it
        attention=attention,
        sample_rows=torch.tensor(sample_rows, dtype=torch.int64),
        segments=_segments(row_slots, tables),
        sample_segments=_segments(sample_slots, tables),
        token_slots=token_slots,
        tables=tables,
    )


def _segments(row_slots: list[tuple[int, int]], tables: AdapterTables) -> list[Segment]:
    """Merge neighbours of one slot; drop rows without a LoRA adapter."""
    segments: list[Segment] = []
    row = 0
    for slot, count in row_slots:
        if segments and segments[-1].slot == slot and segments[-1].end == row:
            segments[-1] = Segment(segments[-1].start, row + count, slot)
        elif tables.has_lora(slot):
            segments.append(Segment(row, row + count, slot))
        row += count
    return segments
