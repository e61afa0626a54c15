"""Steps for kernels: lists become tensors on the device, at addresses that never change."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.adapter_rows import FEW_ROWS, AdapterRows, AdapterTiles, ShapeKey, cut, tile_rows
from kernels.paged_attention import NUM_COUNTERS, DeviceBatch, splits_decodes
from server.model.inputs import HostStep, StepInputs, TokenField
from server.model.step_buffer import StepBuffer


@dataclass(frozen=True)
class Capacity:
    """The most that a step can hold."""

    tokens: int
    sequences: int
    blocks: int  # of one sequence
    slices: int  # of one LoRA site
    choices: int = 0  # experts of one token; 0: there are none


@dataclass(frozen=True)
class Sizes:
    """Of one step as kernels see it, padding included."""

    rows: int
    sequences: int
    logits: int
    max_query_len: int
    splits_decodes: bool = False  # see DeviceBatch


class DeviceInputs:
    """Fills the buffer, and makes views of it."""

    def __init__(self, capacity: Capacity, device: torch.device, token_fields: Sequence[TokenField] = ()) -> None:
        """token_fields: what adapters' ops want to know of each token, beside its slot."""
        self.capacity, self._token_fields = capacity, tuple(token_fields)
        tiles = _most_tiles(capacity.sequences, capacity.tokens, 1)
        fields = {
            "counts": 3,  # tokens, adapter tiles, those of the rows whose logits are wanted
            "token_ids": capacity.tokens,
            "positions": capacity.tokens,
            "slot_mapping": capacity.tokens,
            "token_slots": capacity.tokens,
            **{field.name: capacity.tokens for field in token_fields},
            "logit_rows": capacity.tokens,
            "query_starts": capacity.sequences + 1,
            "kv_lens": capacity.sequences,
            "tiles": 3 * tiles,
            "logit_tiles": 3 * tiles,
            # last and packed, since most of it is seldom used; unpacked on the device
            "block_tables": capacity.sequences * capacity.blocks,
        }
        self.buffer = StepBuffer(fields, device)
        self._block_tables = torch.zeros(capacity.sequences, capacity.blocks, dtype=torch.int32, device=device)
        self._attention_counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device)
        self._route_counters = torch.zeros(2, dtype=torch.int32, device=device)
        # in experts, an adapter may have a tile for each choice of a token
        counted = max(tiles, min(FEW_ROWS, capacity.tokens) * capacity.choices)
        self._tile_counters = torch.zeros(1 + counted * capacity.slices, dtype=torch.int32, device=device)

    def fill(self, step: HostStep, rows: int, shape: ShapeKey, at_all_sites: bool = False) -> StepInputs:
        """Copy `step`, padded to `rows` tokens. A padded step is a decode, and padded with as many sequences.

        shape: take the paths of such adapters, whether or not this step has any. It covers the step's own.
        at_all_sites: see AdapterRows.
        """
        padding = range(len(step.token_ids), rows)
        sizes = Sizes(rows, len(step.query_lens) + len(padding), len(step.logit_rows) + len(padding),
                      max(step.query_lens), splits_decodes(step.query_lens, step.kv_lens))  # fmt: skip
        tile = tile_rows(rows)
        tiles, logit_tiles = cut(step.spans, tile), cut(step.logit_spans, tile)
        stage = self.buffer.stage
        self.buffer.begin()
        stage("counts", [len(step.token_ids), len(tiles), len(logit_tiles)])
        stage("token_ids", step.token_ids, rows, 0)
        stage("positions", step.positions, rows, 0)
        stage("slot_mapping", step.slot_mapping, rows, -1)
        if any(shape):
            stage("token_slots", step.token_slots, rows, 0)
        for field in self._token_fields:
            stage(field.name, field.values(step), rows, field.filler)
        stage("logit_rows", [*step.logit_rows, *padding])
        stage("query_starts", [*_starts(step.query_lens), *(row + 1 for row in padding)])
        stage("kv_lens", step.kv_lens, sizes.sequences, 0)
        stage("tiles", [number for tile in tiles for number in tile])
        stage("logit_tiles", [number for tile in logit_tiles for number in tile])
        self._send(step.block_tables)
        return self.views(sizes, shape, at_all_sites)

    def _send(self, block_tables: list[list[int]]) -> None:
        """Everything that was staged, and the block tables as wide as the longest of them."""
        width = max(map(len, block_tables))
        for index, table in enumerate(block_tables):  # what lies behind a shorter one is never read
            self.buffer.stage("block_tables", table, at=index * width)
        self.buffer.send("block_tables", len(block_tables) * width)
        if width:
            packed = self.buffer.view("block_tables", len(block_tables) * width)
            self._block_tables[: len(block_tables), :width].copy_(packed.view(len(block_tables), width))

    def views(self, sizes: Sizes, shape: ShapeKey, at_all_sites: bool) -> StepInputs:
        """What the device holds of a step of these sizes; always at the same addresses."""
        view, rows, tile = self.buffer.view, sizes.rows, tile_rows(sizes.rows)
        counts = view("counts", 3)
        most_logit_tiles = min(sizes.logits, _most_tiles(sizes.sequences, sizes.logits, rows))
        return StepInputs(
            token_ids=view("token_ids", rows),
            positions=view("positions", rows),
            slot_mapping=view("slot_mapping", rows),
            fresh_blocks=None,
            attention=DeviceBatch(
                query_starts=view("query_starts", sizes.sequences + 1),
                kv_lens=view("kv_lens", sizes.sequences),
                block_tables=self._block_tables[: sizes.sequences],
                counters=self._attention_counters,
                max_query_len=sizes.max_query_len,
                splits_decodes=sizes.splits_decodes,
            ),
            logit_rows=view("logit_rows", sizes.logits),
            rows=AdapterRows(
                view("token_slots", rows) if any(shape) else None,
                self._tiles("tiles", _most_tiles(sizes.sequences, rows, rows), counts[1:2], tile),
                self._tiles("logit_tiles", most_logit_tiles, counts[2:3], tile),
                shape,
                at_all_sites,
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


def _starts(lengths: list[int]) -> list[int]:
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return starts


def padding_step(tokens: int = 1, block_size: int = 1) -> HostStep:
    """One sequence that writes no key: a decode to capture a graph with, or a prefill to compile kernels with."""
    blocks = [0] * -(-tokens // block_size) if tokens > 1 else []
    kv_len = tokens if tokens > 1 else 0
    return HostStep(
        token_ids=[0] * tokens,
        positions=list(range(tokens)),
        slot_mapping=[-1] * tokens,
        token_slots=[0] * tokens,
        query_lens=[tokens],
        kv_lens=[kv_len],
        block_tables=[blocks],
        sample_rows=[tokens - 1],
        logit_rows=[tokens - 1],
    )
