"""One step: first as numbers on the host, then as tensors. Long-lived objects own memory; these own indices."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from kernels import host
from kernels.adapter_rows import MANY_TILE_ROWS, AdapterRows, AdapterTiles, Segment, ShapeKey, cut
from kernels.paged_attention import AttentionBatch, DeviceBatch
from server.engine.plan import Scheduled
from server.engine.request import Request
from server.model.expanded_prefill import HostSequences

Integers = np.ndarray[Any, np.dtype[np.int32]]
Rows = Mapping[Request, int]

_NO_COUNTERS = torch.zeros(0, dtype=torch.int32)  # the host's kernels need none
_NOTHING: Rows = {}


class AdapterTables(Protocol):
    """Which adapters are on the device. What kernels read of them was given to the injected modules at start."""

    def shape_key(self, slot: int) -> ShapeKey:
        """Of the adapter in the slot; ShapeKey() for the base."""


@dataclass(frozen=True)
class HostStep:
    """Tokens of all lanes, flattened; lanes in order of adapter slot, so that each adapter is one segment.

    Running example: lane a (slot 2) decodes its 6th token, b (base) prefills 3 tokens.
        token_ids   [b b b a]    query_lens [3 1]    kv_lens   [5 6]    slots       [0 2]
        positions   [2 3 4 5]    token_slots [0 0 0 2]                  sample_rows [2 3]
        spans       [(3, 4, 2)]  logit_rows [2 3]    logit_spans [(1, 2, 2)]   (of the logits' rows b, a)

    If b asks for log-probabilities of its prompt, logit_rows are [0 1 2 3] and logit_spans [(3, 4, 2)].
    If a's token is what the step before chose for its row 7, it is 0 among the ids and sources are [-1 7].
    """

    block_size: int
    token_ids: Integers  # [T]
    query_lens: Integers  # [S], of each lane; as the next two
    kv_lens: Integers
    slots: Integers  # adapter slot
    block_tables: Sequence[list[int]]
    sample_rows: Integers
    logit_rows: Integers  # whose logits are wanted: sample_rows, and what is told of
    spans: Sequence[Segment] = ()  # rows of adapters, of whatever kind
    logit_spans: Sequence[Segment] = ()  # the same for the rows of the logits
    shape: ShapeKey = ShapeKey()  # of all adapters of the batch
    sources: Integers | None = None  # [S]; -1: all tokens of the lane are known. None: all of all lanes are

    @property
    def is_decode(self) -> bool:
        """Every sequence computes one token, and its logits are wanted: of what is pooled they are not."""
        return len(self.token_ids) == len(self.logit_rows) == len(self.query_lens)

    @cached_property
    def query_starts(self) -> Integers:
        """[S + 1]"""
        return np.concatenate([[0], self.query_lens.cumsum()]).astype(np.int32)

    @cached_property
    def positions(self) -> Integers:
        """[T]"""
        if len(self.token_ids) == len(self.query_lens):
            return self.kv_lens - 1
        ends = np.repeat(self.kv_lens - self.query_starts[1:], self.query_lens)
        return np.arange(len(self.token_ids), dtype=np.int32) + ends

    @cached_property
    def slot_mapping(self) -> Integers:
        """[T]: the KV slot of each token, block * block_size + offset."""
        size, lanes = self.block_size, np.repeat(np.arange(len(self.query_lens)), self.query_lens)
        return self.padded_tables[lanes, self.positions // size] * size + self.positions % size

    @cached_property
    def token_slots(self) -> Integers:
        """[T]: the adapter slot of each token."""
        return np.repeat(self.slots, self.query_lens)

    @cached_property
    def padded_tables(self) -> Integers:
        """[S, blocks of the longest]: block tables one below the other; behind a shorter one's last there is 0."""
        tables = np.zeros((len(self.block_tables), max(map(len, self.block_tables), default=0)), np.int32)
        for row, table in zip(tables, self.block_tables, strict=True):
            row[: len(table)] = table
        return tables


def lay_out(
    plan: Sequence[Scheduled], tables: AdapterTables, block_size: int, chosen_rows: Rows = _NOTHING
) -> HostStep:
    """`plan` is in order of adapter slot. chosen_rows: where the step before chose for each request."""
    lanes = [it.lane for it in plan]
    slots = [lane.slot for lane in lanes]
    query_lens = integers([it.num_tokens for it in plan])
    kv_lens = query_lens + integers([it.start for it in plan])
    token_ids: list[int] = []
    sample_rows: list[int] = []
    fed_back: list[tuple[int, int]] = []  # (sequence, source)
    for index, it in enumerate(plan):
        token_ids += it.lane.tokens[it.start : it.start + it.num_tokens]
        if it.is_fed_back:
            token_ids.append(0)
            fed_back.append((index, chosen_rows[it.lane.request]))
        if it.samples:
            sample_rows.append(len(token_ids) - 1)
    spans = _spans(slots, query_lens.tolist())
    logit_rows, logit_spans = integers(sample_rows), [] if spans else spans
    if any(lane.request.of_prompt is not None for lane in lanes):
        sample_rows, rows, logit_spans = _told_rows(plan)
        logit_rows = integers(rows)
    elif spans:
        logit_spans = spans if len(sample_rows) == len(token_ids) else _spans(
            [it.lane.slot for it in plan if it.samples], [1] * len(sample_rows)
        )  # fmt: skip
    return HostStep(
        block_size,
        integers(token_ids),
        query_lens,
        kv_lens,
        integers(slots),
        [lane.block_table for lane in lanes],
        integers(sample_rows),
        logit_rows,
        spans,
        logit_spans,
        reduce(ShapeKey.joined, map(tables.shape_key, set(slots)), ShapeKey()),
        _sources(fed_back, len(lanes)),
    )


def integers(values: Iterable[int]) -> Integers:
    return np.array(values, np.int32)


def _spans(slots: Sequence[int], counts: Sequence[int]) -> list[Segment]:
    """Rows by adapter, of lanes with so many rows each; none of the base's."""
    spans: list[Segment] = []
    row = 0
    for slot, count in zip(slots, counts, strict=True):
        if slot:
            if spans and spans[-1].slot == slot:
                spans[-1] = Segment(spans[-1].start, row + count, slot)
            else:
                spans.append(Segment(row, row + count, slot))
        row += count
    return spans


def _told_rows(plan: Sequence[Scheduled]) -> tuple[list[int], list[int], list[Segment]]:
    """sample_rows, logit_rows and logit_spans where logits of more than each lane's last token may be wanted."""
    sample_rows: list[int] = []
    logit_rows: list[int] = []
    counts: list[int] = []
    end = 0
    for it in plan:
        end += it.num_tokens
        wanted = it.logit_positions
        first = end - (it.start + it.num_tokens - wanted.start)
        logit_rows.extend(range(first, first + len(wanted)))
        counts.append(len(wanted))
        if it.chooses:
            sample_rows.append(end - 1)
    slots = [it.lane.slot for it, count in zip(plan, counts, strict=True) if count]
    return sample_rows, logit_rows, _spans(slots, list(filter(None, counts)))


def _sources(fed_back: Sequence[tuple[int, int]], count: int) -> Integers | None:
    if not fed_back:
        return None
    sources = np.full(count, -1, np.int32)
    for index, source in fed_back:
        sources[index] = source
    return sources


@dataclass(frozen=True)
class TokenField:
    """A number a token that the ops of some kind of part want to know, beside the token's adapter slot.

    `filler` is that of a token that only pads the batch.
    """

    name: str
    values: Callable[[HostStep], Sequence[int]]
    filler: int = 0


@dataclass(frozen=True)
class StepInputs:
    """A step as tensors, for the host's path or for kernels. Integers are int64 there (what describes
    sequences and adapters int32) and int32 here."""

    token_ids: Tensor  # [T]
    positions: Tensor  # [T]
    slot_mapping: Tensor  # [T]; -1: a token that only pads the batch
    fresh_blocks: Tensor | None  # KV blocks that come into use with this step; None: nobody reads past an end
    attention: AttentionBatch | DeviceBatch
    logit_rows: Tensor  # [R]: rows whose logits are wanted
    rows: AdapterRows
    # for expert_route's kernel: how many tokens are real, and its counters
    num_tokens: Tensor | None = None  # [1]
    route_counters: Tensor | None = None  # [2], zero; left zero
    fields: Mapping[str, Tensor] = field(default_factory=dict)  # [T] each, by name of their TokenField
    sequences: HostSequences | None = None  # of a step that is launched kernel by kernel


def of_all_rows(inputs: StepInputs) -> StepInputs:
    """The same step, with every token's logits wanted: adapters' rows of them are those of the tokens."""
    it = inputs.logit_rows
    rows = torch.arange(len(inputs.token_ids), dtype=it.dtype, device=it.device)
    return replace(inputs, logit_rows=rows, rows=inputs.rows._replace(sampled=inputs.rows.tiles))


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


def host_inputs(
    step: HostStep,
    dtype: torch.dtype,
    token_fields: Sequence[TokenField] = (),
    chosen: Tensor | None = None,
) -> StepInputs:
    """For the host's kernels, or the references where there are none. `dtype` is the model's. chosen: what the step
    before chose, where some of it is this step's tokens."""
    slot_mapping = _on_host(step.slot_mapping)
    by_kernels = host.takes_on(torch.device("cpu"), dtype)
    return StepInputs(
        token_ids=_token_ids(step, chosen),
        positions=_on_host(step.positions),
        slot_mapping=slot_mapping,
        # a block is taken for the token that begins it
        fresh_blocks=None if by_kernels else slot_mapping[slot_mapping % step.block_size == 0] // step.block_size,
        attention=_host_batch(step)
        if by_kernels
        else AttentionBatch(
            step.query_lens.tolist(), step.kv_lens.tolist(), list(step.block_tables), step.block_size, dtype
        ),
        logit_rows=_on_host(step.logit_rows),
        rows=AdapterRows(
            torch.from_numpy(step.token_slots) if any(step.shape) else None,
            _host_tiles(step.spans, by_kernels),
            _host_tiles(step.logit_spans, by_kernels),
            step.shape,
        ),
        fields={it.name: torch.tensor(it.values(step)) for it in token_fields},
    )


def _on_host(numbers: Integers) -> Tensor:
    return torch.from_numpy(numbers.astype(np.int64))


def _token_ids(step: HostStep, chosen: Tensor | None) -> Tensor:
    ids = _on_host(step.token_ids)
    if step.sources is not None:
        assert chosen is not None
        fed = step.sources >= 0
        ids[_on_host(step.query_starts[1:][fed] - 1)] = chosen[_on_host(step.sources[fed])]
    return ids


def _host_batch(step: HostStep) -> DeviceBatch:
    return DeviceBatch(torch.from_numpy(step.query_starts), torch.from_numpy(step.kv_lens),
                       torch.from_numpy(step.padded_tables), _NO_COUNTERS, int(step.query_lens.max()))  # fmt: skip


def _host_tiles(spans: Sequence[Segment], by_kernels: bool) -> AdapterTiles:
    if not by_kernels:
        return AdapterTiles(spans)
    tiles = torch.tensor(cut(spans, MANY_TILE_ROWS), dtype=torch.int32).view(-1, 3)
    return AdapterTiles(spans, tiles, tile_rows=MANY_TILE_ROWS)
