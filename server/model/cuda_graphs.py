"""Decode steps from captured CUDA graphs.

A decode step of a small batch is hundreds of launches of a few microseconds each; a graph launches them as one. Graphs
read indices, adapter tables and weights where they lie, and those never move: one graph serves every mix of adapters.
They differ by what cannot be data: the number of rows (padded to a few sizes), whether LoRA and expert adapters take
part at all (a batch of base requests does no adapter work), the places where LoRA acts and the largest rank.
"""

from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple, Protocol

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

    def __call__(self, compute: Callable[[], Tensor]) -> _Graph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles what is not compiled yet, and lets libraries set themselves up
            for _ in range(2):
                compute()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # thread-local: the transfer thread maps memory and copies meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
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
        self._sizes = batch_sizes(largest_batch)
        self._graphs: dict[GraphKey, Captured] = {}
        self._capture_one = capture

    def logits(self, step: HostStep) -> Tensor:
        if not step.is_decode or len(step.token_ids) > self._sizes[-1]:
            return self.eager.logits(step)
        rows = self._sizes[bisect_left(self._sizes, len(step.token_ids))]
        key = self._key(rows, bool(step.spans), step.has_experts)
        captured = self._graphs.get(key) or self._capture(key)
        self._fill(step, key)
        captured.replay()
        return captured.output[: len(step.token_ids)]

    @torch.inference_mode()
    def warm_up(self, block_size: int, has_experts: bool, on_progress: Callable[[str, int, int], None]) -> None:
        """Compile what a prefill needs, and capture every batch size of base and expert decodes.

        The largest come first: the others fit into their memory, and what does not fit at all fails now. Graphs with
        LoRA wait until one is used, since they depend on the places where it acts.
        """
        longest = min(self._inputs.capacity.tokens, self._inputs.capacity.blocks * block_size)
        prefills = [longest, min(64, longest)]
        keys = [self._key(rows, False, experts) for experts in {False, has_experts} for rows in reversed(self._sizes)]
        total = len(prefills) + len(keys)
        for done, tokens in enumerate(prefills, start=1):
            self.eager.logits(padding_step(tokens, block_size))
            on_progress("Compiling kernels", done, total)
        for done, key in enumerate(keys, start=len(prefills) + 1):
            self._capture(key)
            on_progress("Capturing graphs", done, total)

    @property
    def num_captured(self) -> int:
        return len(self._graphs)

    def _key(self, rows: int, with_lora: bool, with_experts: bool) -> GraphKey:
        tables = self._tables
        return GraphKey(
            rows, tables.max_rank if with_lora else 0, tables.num_sites_used if with_lora else 0, with_experts
        )

    def _fill(self, step: HostStep, key: GraphKey) -> object:
        return self._inputs.fill(step, key.rows, key.max_rank, key.max_rank > 0, key.with_experts)

    def _capture(self, key: GraphKey) -> Captured:
        for old in list(self._graphs):
            if old.rows == key.rows and old.with_experts == key.with_experts and 0 < old.num_sites < key.num_sites:
                del self._graphs[old]  # sites are only ever added
        inputs = self._inputs.fill(padding_step(), key.rows, key.max_rank, key.max_rank > 0, key.with_experts)
        captured = self._graphs[key] = self._capture_one(lambda: self._model(inputs))
        return captured
