"""Decode steps from captured CUDA graphs.

A decode step of a small batch is hundreds of launches of a few microseconds each; a graph launches them as one. Graphs
read indices, adapter tables and weights where they lie, and those never move: one graph serves every mix of adapters.
They differ by what cannot be data: the number of rows (padded to a few sizes), whether LoRA and expert adapters take
part at all (a batch of base requests does no adapter work), the places where LoRA acts and the largest rank.
"""

import logging
from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from server.model.device_inputs import DeviceInputs, padding_step
from server.model.forward import KernelForward, Model
from server.model.inputs import AdapterTables, HostStep

log = logging.getLogger("heddle.model")


class GraphKey(NamedTuple):
    rows: int
    max_rank: int  # 0: no LoRA
    num_sites: int  # 0: no LoRA
    with_experts: bool


class Captured(Protocol):
    """A computation that can be run again on the same memory."""

    output: Tensor

    def replay(self) -> None: ...


class Capture(Protocol):
    def __call__(self, compute: Callable[[], Tensor]) -> Captured: ...


class _Graph:
    def __init__(self, graph: torch.cuda.CUDAGraph, output: Tensor) -> None:
        self._graph, self.output = graph, output  # the output lies in the graph's own memory

    def replay(self) -> None:
        self._graph.replay()


class CudaCapture:
    """Captures into graphs that share one pool of memory: their outputs are read before the next is replayed."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        # one for all: libraries keep a workspace for every stream that they have seen
        self._stream = torch.cuda.Stream()

    def __call__(self, compute: Callable[[], Tensor]) -> _Graph:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # compiles what is not compiled yet, and lets libraries set themselves up
            compute()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # thread-local: the transfer thread maps memory and copies meanwhile
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            output = compute()
        return _Graph(graph, output)


def batch_sizes(largest: int) -> list[int]:
    """1, 2, 4, multiples of 8 up to 64, of 16 up to 256, of 64 beyond: padding is half at worst and mostly little."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, largest + 64, 64)]
    return [size for size in sizes if size < largest] + [largest]


class GraphedForward:
    """Captured graphs for decodes, plain launches for the rest."""

    def __init__(
        self, model: Model, inputs: DeviceInputs, tables: AdapterTables, largest_batch: int, capture: Capture
    ) -> None:
        self.eager = KernelForward(model, inputs, tables)
        self._model, self._inputs, self._tables = model, inputs, tables
        self.sizes = batch_sizes(largest_batch)
        self._graphs: dict[GraphKey, Captured | None] = {}
        self._capture_one = capture

    def logits(self, step: HostStep) -> Tensor:
        if not step.is_decode or len(step.token_ids) > self.sizes[-1]:
            return self.eager.logits(step)
        rows = self.sizes[bisect_left(self.sizes, len(step.token_ids))]
        captured = self.captured(rows, bool(step.spans), step.has_experts)
        if captured is None:
            return self.eager.logits(step)
        self._inputs.fill(step, rows, self._tables.max_rank, bool(step.spans), step.has_experts)
        captured.replay()
        return captured.output[: len(step.token_ids)]

    @property
    def num_captured(self) -> int:
        return len(self._graphs)

    def captured(self, rows: int, with_lora: bool, with_experts: bool) -> Captured | None:
        """The graph for batches padded to `rows`, captured now if need be; None where that has failed."""
        tables = self._tables
        key = GraphKey(rows, tables.max_rank * with_lora, tables.num_sites_used * with_lora, with_experts)
        if key not in self._graphs:
            try:
                self._graphs[key] = self._capture_one(self._padded(key))
            except RuntimeError as error:  # out of memory is one too
                log.warning("a decode of %d rows cannot be captured and is launched kernel by kernel: %s", rows, error)
                self._graphs[key] = None
            self._drop_outdated(key)
        return self._graphs[key]

    def _padded(self, key: GraphKey) -> Callable[[], Tensor]:
        inputs = self._inputs.fill(padding_step(), key.rows, key.max_rank, key.max_rank > 0, key.with_experts)
        return lambda: self._model(inputs)

    def _drop_outdated(self, new: GraphKey) -> None:
        """Ranks and sites only grow. After the new capture: the pool of memory must not be left without a graph."""
        kind = (new.rows, new.with_experts)
        for key in list(self._graphs):
            if new.max_rank and key.max_rank and key != new and (key.rows, key.with_experts) == kind:
                del self._graphs[key]
