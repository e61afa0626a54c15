"""Steps for kernels: one buffer of integers, filled on the host and copied to the device in one piece.

The device's side never moves, so a captured graph finds each step's indices where it found those of the step that it
was captured with.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.adapter_rows import AdapterRows, AdapterTiles, ShapeKey, cut, tile_rows
from kernels.paged_attention import NUM_COUNTERS, DeviceBatch, splits_decodes
from server.model.inputs import HostStep, StepInputs

_ALIGN = 4  # integers: 16 bytes, so that kernels may load vectors


@dataclass(frozen=True)
class Capacity:
    """The most that a step can hold."""

    tokens: int
    sequences: int
    blocks: int  # of one sequence
    slices: int  # of one LoRA site


def _most_tiles(sequences: int, rows: int) -> int:
    """Adapter tiles: every sequence may have an adapter of its own, and there are tiles that are full besides."""
    return sequences + rows // tile_rows(rows)


class DeviceInputs:
    """The buffer, and views of it."""

    def __init__(self, capacity: Capacity, device: torch.device) -> None:
        self.capacity = capacity
        tiles = capacity.sequences + capacity.tokens // tile_rows(1)
        sizes = {
            "counts": 3,  # tokens, adapter tiles, those of the sampled rows
            "token_ids": capacity.tokens,
            "positions": capacity.tokens,
            "slot_mapping": capacity.tokens,
            "token_slots": capacity.tokens,
            "sample_rows": capacity.sequences,
            "query_starts": capacity.sequences + 1,
            "kv_lens": capacity.sequences,
            "tiles": 3 * tiles,
            "sample_tiles": 3 * capacity.sequences,
            # last and packed, since most of it is seldom used; unpacked on the device
            "block_tables": capacity.sequences * capacity.blocks,
        }
        total = 0
        self._ranges: dict[str, tuple[int, int]] = {}
        for name, size in sizes.items():
            self._ranges[name] = (total, total + size)
            total += -(-size // _ALIGN) * _ALIGN
        self._host = torch.zeros(total, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._staged = self._host.numpy()
        self._device = torch.zeros(total, dtype=torch.int32, device=device)
        self._block_tables = torch.zeros(capacity.sequences, capacity.blocks, dtype=torch.int32, device=device)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None  # the last copy out of the host's side
        self._attention_counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device)
        self._route_counters = torch.zeros(2, dtype=torch.int32, device=device)
        self._lora_counters = torch.zeros(1 + tiles * capacity.slices, dtype=torch.int32, device=device)

    def fill(self, step: HostStep, rows: int, shape: ShapeKey, is_captured: bool = False) -> StepInputs:
        """Copy `step`, padded to `rows` tokens. A padded step is a decode, and padded with as many sequences.

        shape: take the paths of such adapters, whether or not this step has any. It covers the step's own.
        is_captured: see AdapterRows.
        """
        if self._copied is not None:
            self._copied.synchronize()  # long over, unless the last step sampled nothing and nobody waited for it
        num_sequences = len(step.query_lens) + rows - len(step.token_ids)
        tile = tile_rows(rows)
        tiles, sample_tiles = cut(step.spans, tile), cut(step.sample_spans, tile)
        self._stage("counts", [len(step.token_ids), len(tiles), len(sample_tiles)])
        self._stage("token_ids", step.token_ids, rows, 0)
        self._stage("positions", step.positions, rows, 0)
        self._stage("slot_mapping", step.slot_mapping, rows, -1)
        if shape.experts:
            self._stage("token_slots", step.token_slots, rows, 0)
        padding = range(len(step.token_ids), rows)
        self._stage("sample_rows", [*step.sample_rows, *padding])
        self._stage("query_starts", [*_starts(step.query_lens), *(row + 1 for row in padding)])
        self._stage("kv_lens", step.kv_lens, num_sequences, 0)
        self._stage("tiles", [number for tile in tiles for number in tile])
        self._stage("sample_tiles", [number for tile in sample_tiles for number in tile])
        self._copy(step.block_tables)
        return self.views(rows, num_sequences, len(step.sample_rows) + len(padding), max(step.query_lens), shape,
                          is_captured, splits_decodes(step.query_lens, step.kv_lens))  # fmt: skip

    def _copy(self, block_tables: list[list[int]]) -> None:
        """Everything that was staged, and the block tables as wide as the longest of them."""
        begin, width = self._ranges["block_tables"][0], max(map(len, block_tables))
        for index, table in enumerate(block_tables):
            self._staged[begin + index * width : begin + index * width + len(table)] = table
        end = begin + len(block_tables) * width
        self._device[:end].copy_(self._host[:end], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        if width:
            packed = self._device[begin:end].view(len(block_tables), width)
            self._block_tables[: len(block_tables), :width].copy_(packed)

    def views(
        self, rows: int, num_sequences: int, num_samples: int, max_query_len: int, shape: ShapeKey, is_captured: bool,
        long_decodes: bool = False,
    ) -> StepInputs:  # fmt: skip
        """What the device holds of a step of these sizes; always at the same addresses."""
        tile = tile_rows(rows)
        counts = self._view("counts", 3)
        tiles = _most_tiles(num_sequences, rows)
        return StepInputs(
            token_ids=self._view("token_ids", rows),
            positions=self._view("positions", rows),
            slot_mapping=self._view("slot_mapping", rows),
            fresh_blocks=None,
            attention=DeviceBatch(
                query_starts=self._view("query_starts", num_sequences + 1),
                kv_lens=self._view("kv_lens", num_sequences),
                block_tables=self._block_tables[:num_sequences],
                counters=self._attention_counters,
                max_query_len=max_query_len,
                splits_decodes=long_decodes,
            ),
            sample_rows=self._view("sample_rows", num_samples),
            rows=AdapterRows(
                self._view("token_slots", rows) if shape.experts else None,
                self._tiles("tiles", tiles, counts[1:2], tile),
                self._tiles("sample_tiles", num_samples, counts[2:3], tile),
                shape,
                is_captured,
            ),
            num_tokens=counts[:1],
            route_counters=self._route_counters,
        )

    def _tiles(self, name: str, most: int, count: Tensor, tile: int) -> AdapterTiles:
        return AdapterTiles((), self._view(name, 3 * most).view(most, 3), count, tile, self._lora_counters)

    def _stage(self, name: str, values: Sequence[int], count: int | None = None, filler: int = 0) -> None:
        """Write `values`, and `filler` behind them up to `count`."""
        begin = self._ranges[name][0]
        self._staged[begin : begin + len(values)] = values
        if count is not None:
            self._staged[begin + len(values) : begin + count] = filler

    def _view(self, name: str, size: int) -> Tensor:
        begin, end = self._ranges[name]
        assert begin + size <= end, (name, size, end - begin)
        return self._device[begin : begin + size]


def _starts(lengths: list[int]) -> list[int]:
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return starts


def padding_step(tokens: int = 1, block_size: int = 1) -> HostStep:
    """One sequence that writes no key: a decode to capture a graph with, or a prefill to compile kernels with."""
    blocks = [0] * -(-tokens // block_size) if tokens > 1 else []
    kv_len = tokens if tokens > 1 else 0
    return HostStep([0] * tokens, list(range(tokens)), [-1] * tokens, [0] * tokens, [tokens], [kv_len], [blocks],
                    [tokens - 1], [], [], ShapeKey())  # fmt: skip
