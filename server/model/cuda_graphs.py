"""Decode steps from captured CUDA graphs.

A decode step of a small batch is hundreds of launches of a few microseconds each; a graph launches them as one. Graphs
read indices, adapter tables and weights where they lie, and those never move: one graph serves every mix of adapters.
They differ by what cannot be data: the number of rows (padded to a few sizes), whether LoRA and expert adapters take
part at all (a batch of base requests does no adapter work), the places where LoRA acts and the largest rank.
"""

from bisect import bisect_left
from typing import NamedTuple

import torch
from torch import Tensor

from server.model.device_inputs import DeviceInputs, padding_step
from server.model.forward import KernelForward, Model
from server.model.inputs import AdapterTables, HostStep


class GraphKey(NamedTuple):
    rows: int
    max_rank: int  # 0: no LoRA
    num_sites: int  # 0: no LoRA
    with_experts: bool


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    logits: Tensor  # the graph's own memory


def batch_sizes(largest: int) -> list[int]:
    """1, 2, 4, multiples of 8 up to 64, of 16 up to 256, of 64 beyond: padding is half at worst and mostly little."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, largest + 64, 64)]
    return [size for size in sizes if size < largest] + [largest]


class GraphedForward:
    """Captured graphs for decodes, plain launches for the rest."""

    def __init__(self, model: Model, inputs: DeviceInputs, tables: AdapterTables, largest_batch: int) -> None:
        self.eager = KernelForward(model, inputs, tables)
        self._model, self._inputs, self._tables = model, inputs, tables
        self._sizes = batch_sizes(largest_batch)
        self._graphs: dict[GraphKey, _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def logits(self, step: HostStep) -> Tensor:
        if not step.is_decode or len(step.token_ids) > self._sizes[-1]:
            return self.eager.logits(step)
        rows = self._sizes[bisect_left(self._sizes, len(step.token_ids))]
        key = self._key(rows, bool(step.spans), step.has_experts)
        captured = self._graphs.get(key) or self._capture(key)
        self._fill(step, key)
        captured.graph.replay()
        return captured.logits[: len(step.token_ids)]

    def capture_all(self, with_lora: bool = False, with_experts: bool = False) -> int:
        """Capture every batch size ahead, the largest first: the others fit into its memory. Returns how many."""
        for rows in reversed(self._sizes):
            key = self._key(rows, with_lora, with_experts)
            if key not in self._graphs:
                self._capture(key)
        return len(self._sizes)

    def _key(self, rows: int, with_lora: bool, with_experts: bool) -> GraphKey:
        tables = self._tables
        return GraphKey(
            rows, tables.max_rank if with_lora else 0, tables.num_sites_used if with_lora else 0, with_experts
        )

    def _fill(self, step: HostStep, key: GraphKey) -> object:
        return self._inputs.fill(step, key.rows, key.max_rank, key.max_rank > 0, key.with_experts)

    def _capture(self, key: GraphKey) -> _Captured:
        for old in [
            it for it in self._graphs if it[0] == key[0] and it[3] == key[3] and 0 < it.num_sites < key.num_sites
        ]:
            del self._graphs[old]  # sites are only ever added
        inputs = self._inputs.fill(padding_step(), key.rows, key.max_rank, key.max_rank > 0, key.with_experts)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles what is not compiled yet, and lets libraries set themselves up
            for _ in range(2):
                self._model(inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # thread-local: the transfer thread maps memory and copies meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = self._model(inputs)
        captured = self._graphs[key] = _Captured(graph, logits)
        return captured
