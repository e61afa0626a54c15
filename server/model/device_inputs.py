"""Steps for kernels: numbers become tensors on the device, at addresses that never change."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from kernels.adapter_rows import FEW_ROWS, AdapterRows, AdapterTiles, Segment, ShapeKey, covering, cut, tile_rows
from kernels.paged_attention import NUM_COUNTERS, DeviceBatch
from kernels.sampling import Sampled
from kernels.step_rows import Sequences, StepRows, step_rows, write_tables
from server.model.block_tables import BlockTables, as_runs
from server.model.draws import Draws
from server.model.inputs import HostStep, Integers, StepInputs, TokenField, integers
from server.model.step_buffer import StepBuffer

_PER_SEQUENCE = ("kv_lens", "seats", "slots", "sources")


@dataclass(frozen=True)
class Capacity:
    """The most that a step can hold."""

    tokens: int
    sequences: int
    blocks: int  # of one sequence
    slices: int  # of one LoRA site
    choices: int = 0  # experts of one token; 0: there are none
    block_size: int = 16


@dataclass(frozen=True)
class Sizes:
    """Of one step as kernels see it, padding included."""

    rows: int
    sequences: int
    logits: int
    max_query_len: int

    @classmethod
    def of(cls, step: HostStep) -> Self:
        """Without padding."""
        query_lens = step.query_lens
        return cls(len(step.token_ids), len(query_lens), len(step.logit_rows), int(query_lens.max()))


class _Tiles(NamedTuple):
    """Of one step's spans, and which they were cut of: those of a batch that goes on decoding stay the same."""

    spans: Sequence[Segment]
    rows: int
    tile: int
    numbers: Integers


class DeviceInputs:
    """Fills the buffer, and makes views of it.

    last: what the last step chose in each of its rows; the next one may have it among its tokens.
    """

    def __init__(self, capacity: Capacity, device: torch.device, token_fields: Sequence[TokenField] = ()) -> None:
        """token_fields: what adapters' ops want to know of each token, beside its slot."""
        self.capacity, self._token_fields = capacity, tuple(token_fields)
        tiles, sequences = _most_tiles(capacity.sequences, capacity.tokens, 1), capacity.sequences + 1  # one pads
        fields = {
            "counts": 5,  # tokens, adapter tiles, those of the logits' rows, those that cover all rows, runs
            "token_ids": capacity.tokens,
            **{field.name: capacity.tokens for field in token_fields},
            "logit_rows": capacity.tokens,
            "query_starts": sequences + 1,
            **dict.fromkeys((*_PER_SEQUENCE, *Draws.names()), sequences),
            "tiles": 3 * tiles,
            "logit_tiles": 3 * tiles,
            "cover": 3 * (2 * tiles + 1),  # a span of the base before each of an adapter, and behind the last
            "runs": 4 * sequences,
            "blocks": capacity.sequences * capacity.blocks,  # last, since most of it is seldom used
        }
        self.buffer = StepBuffer(fields, device)
        self.token_ids = self.buffer.view("token_ids", capacity.tokens)
        self._tables = BlockTables(capacity.sequences, capacity.blocks, device)
        self._cut: dict[str, _Tiles] = {}

        def zeros(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(*size, dtype=dtype, device=device)

        self.last = Sampled(zeros(capacity.sequences, dtype=torch.int64), zeros(capacity.sequences, dtype=torch.bool))
        self._positions, self._slot_mapping, self._token_slots = zeros(3, capacity.tokens)
        self._block_tables = zeros(sequences, capacity.blocks)
        self._attention_counters = zeros(NUM_COUNTERS)
        self._route_counters = zeros(2)
        # those that cover all rows are as many; in experts, an adapter may have a tile for each choice of a token
        counted = max(2 * tiles + 1, min(FEW_ROWS, capacity.tokens) * capacity.choices)
        self._tile_counters = zeros(1 + counted * capacity.slices)

    def fill(self, step: HostStep, shape: ShapeKey, at_all_sites: bool = False) -> StepInputs:
        """Without padding. shape: take the paths of such adapters, whether or not this step has any; it covers the
        step's own. at_all_sites: see AdapterRows."""
        sizes = Sizes.of(step)
        self.send(step, sizes, shape)
        return self.laid_out(sizes, shape, at_all_sites)

    def send(self, step: HostStep, sizes: Sizes, shape: ShapeKey, draws: Draws | None = None) -> None:
        """Copy `step`, padded to `sizes`, and how its tokens are drawn. A padded decode has a sequence for each row."""
        assert step.block_size == self.capacity.block_size
        count, tile = len(step.token_ids), tile_rows(sizes.rows)
        tiles = self._tiles_of("tiles", step.spans, 0, tile)
        logit_tiles = self._tiles_of("logit_tiles", step.logit_spans, 0, tile)
        cover = self._tiles_of("cover", step.spans, sizes.rows, tile) if shape.rank else integers(())
        seats, changes = self._tables.seat(step.block_tables)
        stage = self.buffer.stage
        self.buffer.begin()
        stage("counts", [count, len(tiles) // 3, len(logit_tiles) // 3, len(cover) // 3, len(changes.runs)])
        stage("token_ids", step.token_ids)
        for field in self._token_fields:
            stage(field.name, field.values(step), sizes.rows, field.filler)
        stage("logit_rows", step.logit_rows, sizes.logits)
        self._stage_sequences(step, seats, sizes)
        for name, values in zip(Draws.names(), draws or (), strict=False):
            stage(name, values, sizes.logits)  # what pads is chosen greedily
        for name, numbers in (("tiles", tiles), ("logit_tiles", logit_tiles), ("cover", cover)):
            stage(name, numbers)
        stage("runs", as_runs(changes))
        stage("blocks", changes.blocks)
        self.buffer.send("blocks", len(changes.blocks))

    def _stage_sequences(self, step: HostStep, seats: Integers, sizes: Sizes) -> None:
        """Those that pad a decode have a row each, and no tokens before; of those that pad another step the first has
        all rows that are left."""
        stage, starts, missing = self.buffer.stage, step.query_starts, sizes.sequences - len(seats)
        stage("query_starts", starts)
        if missing:
            is_decode = sizes.max_query_len == 1
            ends = starts[-1] + np.arange(1, missing + 1) if is_decode else np.full(missing, sizes.rows)
            stage("query_starts", ends, at=len(starts))
        stage("kv_lens", step.kv_lens, sizes.sequences)
        stage("seats", seats, sizes.sequences)
        stage("slots", step.slots, sizes.sequences)
        stage("sources", integers(()) if step.sources is None else step.sources, sizes.sequences, -1)

    def _tiles_of(self, name: str, spans: Sequence[Segment], rows: int, tile: int) -> Integers:
        """rows: to cover all of so many; 0: none but the spans' own."""
        last = self._cut.get(name)
        if last is None or last.spans is not spans or (last.rows, last.tile) != (rows, tile):
            segments = covering(spans, rows) if rows else spans
            numbers = np.array(cut(segments, tile), np.int32).reshape(-1)
            last = self._cut[name] = _Tiles(spans, rows, tile, numbers)
        return last.numbers

    def laid_out(self, sizes: Sizes, shape: ShapeKey, at_all_sites: bool = False) -> StepInputs:
        """What was sent, laid out: two launches, which a captured graph begins with."""
        view, count = self.buffer.view, sizes.sequences
        counts = view("counts", 5)
        blocks = view("blocks", self.capacity.sequences * self.capacity.blocks)
        write_tables(self._tables.on_device, view("runs", 4 * count).view(count, 4), counts[4:5], blocks)
        sequences = Sequences(view("query_starts", count + 1), *(view(name, count) for name in _PER_SEQUENCE))
        step_rows(sequences, self._tables.on_device, self.last.tokens, self.capacity.block_size, self._rows(sizes))
        return self.views(sizes, shape, at_all_sites)

    def _rows(self, sizes: Sizes) -> StepRows:
        rows = sizes.rows
        return StepRows(self.buffer.view("token_ids", rows), self._positions[:rows], self._slot_mapping[:rows],
                        self._token_slots[:rows], self._block_tables[: sizes.sequences])  # fmt: skip

    def draws(self, count: int) -> Draws:
        """How so many tokens are drawn, on the device."""
        return Draws(*(self.buffer.view(name, count, dtype) for name, dtype in Draws.types().items()))

    def views(self, sizes: Sizes, shape: ShapeKey, at_all_sites: bool) -> StepInputs:
        """What the device holds of a step of these sizes; always at the same addresses."""
        view, rows, tile = self.buffer.view, sizes.rows, tile_rows(sizes.rows)
        counts, laid_out = view("counts", 5), self._rows(sizes)
        most = _most_tiles(sizes.sequences, rows, rows)
        most_logit_tiles = min(sizes.logits, _most_tiles(sizes.sequences, sizes.logits, rows))
        return StepInputs(
            token_ids=laid_out.token_ids,
            positions=laid_out.positions,
            slot_mapping=laid_out.slot_mapping,
            fresh_blocks=None,
            attention=DeviceBatch(
                query_starts=view("query_starts", sizes.sequences + 1),
                kv_lens=view("kv_lens", sizes.sequences),
                block_tables=laid_out.block_tables,
                counters=self._attention_counters,
                max_query_len=sizes.max_query_len,
            ),
            logit_rows=view("logit_rows", sizes.logits),
            rows=AdapterRows(
                laid_out.token_slots if any(shape) else None,
                self._tiles("tiles", most, counts[1:2], tile),
                self._tiles("logit_tiles", most_logit_tiles, counts[2:3], tile),
                shape,
                at_all_sites,
                self._tiles("cover", 2 * most + 1, counts[3:4], tile) if shape.rank else None,
            ),
            num_tokens=counts[:1],
            route_counters=self._route_counters,
            fields={field.name: view(field.name, rows) for field in self._token_fields},
        )

    def _tiles(self, name: str, most: int, count: Tensor, tile: int) -> AdapterTiles:
        tiles = self.buffer.view(name, 3 * most).view(most, 3)
        return AdapterTiles(None, tiles, count, tile, self._tile_counters)


def _most_tiles(sequences: int, tokens: int, rows: int) -> int:
    """Adapter tiles of a step of so many rows: every sequence may have an adapter of its own, and there are tiles that
    are full besides."""
    return sequences + tokens // tile_rows(rows)


def padding_step(block_size: int, tokens: int = 1) -> HostStep:
    """One sequence of the base's: a decode that writes no key, to capture a graph with, or a prefill to compile kernels
    with, which writes to block 0."""
    blocks = [0] * -(-tokens // block_size) if tokens > 1 else []
    last = integers([tokens - 1])
    return HostStep(
        block_size,
        token_ids=np.zeros(tokens, np.int32),
        query_lens=integers([tokens]),
        kv_lens=integers([tokens if tokens > 1 else 0]),
        slots=integers([0]),
        block_tables=[blocks],
        sample_rows=last,
        logit_rows=last,
    )
