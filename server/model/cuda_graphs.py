"""Steps from captured CUDA graphs.

A decode step of a small batch is hundreds of launches of a few microseconds each; a graph launches them as one. So it
is with up to a few hundred tokens of prompts beside decodes, where everybody would wait for the host. Graphs
read indices, adapter tables and weights where they lie, and those never move: one graph serves every mix of adapters.
They differ by what cannot be data: the number of rows and of sequences (padded to a few sizes), and how much of the
adapters' work takes part at all: none (a batch of base requests does none), LoRA's, or everything. A step takes the
first that covers it, so their number does not double with every kind of part.

A graph goes from the numbers that the host sends of each sequence to the tokens that are chosen: the next one may be
launched before the host knows them.

All of them are captured at start, those with LoRA at every site and for ranks up to --max-rank: a capture while serving
would stall everybody. A batch with a higher rank is launched kernel by kernel.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.adapter_rows import ShapeKey
from kernels.sampling import Parameters, Sampled, sample
from server.model.device_inputs import Sizes, padding_step
from server.model.draws import Draws
from server.model.forward import Computed, KernelForward
from server.model.inputs import HostStep

MIXED_ROWS = (64, 128, 256, 384, 512)  # beyond, a step takes the device longer than the host
Compute = Callable[[], object]  # on memory that stays where it is
Capture = Callable[[Compute], Callable[[], object]]  # returns what computes the same again


class CaptureError(RuntimeError):
    """A decode cannot be captured. The engine does not start: it would be several times as slow as it should be."""


class GraphKey(NamedTuple):
    """As many sequences as rows: each computes one token. Fewer: some compute several, and one more only pads."""

    rows: int
    sequences: int
    shape: ShapeKey

    @property
    def sizes(self) -> Sizes:
        is_decode = self.rows == self.sequences
        if is_decode:
            return Sizes(self.rows, self.rows, self.rows, 1)
        return Sizes(self.rows, self.sequences + 1, self.sequences, self.rows)


class CudaCapture:
    """Captures into graphs that share one pool of memory: what they compute is read before the next is replayed."""

    def __init__(self, cuda: Any = torch.cuda) -> None:
        self._cuda = cuda
        self.take_new_pool()
        # one for all: libraries keep a workspace for every stream that they have seen
        self._stream = cuda.Stream()

    def __call__(self, compute: Compute) -> Callable[[], object]:
        """Whatever `compute` raises. Captures that follow, and launches without one, then work as before."""
        before = self._cuda.current_stream()
        self._stream.wait_stream(before)
        with self._cuda.stream(self._stream):  # compiles what is not compiled yet, and lets libraries set themselves up
            compute()
        before.wait_stream(self._stream)
        graph = self._cuda.CUDAGraph()
        try:
            # thread-local: the transfer thread maps memory and copies meanwhile
            with self._cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                compute()
        except BaseException:
            # torch ends the capture before it restores the stream, and where ending fails it does not restore it; the
            # allocator then goes on to take the old pool for one that is being captured into
            self._cuda.set_stream(before)
            self.take_new_pool()
            raise
        return graph.replay  # type: ignore[no-any-return]

    def take_new_pool(self) -> None:
        """A pool cannot be captured into again once all of its graphs are gone, or one that failed has kept it."""
        self._pool = self._cuda.graph_pool_handle()


def batch_sizes(largest: int) -> list[int]:
    """1, 2, 4, multiples of 8 up to 64, of 16 up to 256, of 64 beyond: padding is half at worst and mostly little."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, largest + 64, 64)]
    return [size for size in sizes if size < largest] + [largest]


def mixed_sizes(most_tokens: int, most_sequences: int) -> list[tuple[int, int]]:
    """(rows, sequences) of steps with prompts: at most half as many sequences as tokens, since some have several."""
    return [(rows, min(rows // 2, most_sequences)) for rows in MIXED_ROWS if rows <= most_tokens]


class GraphedForward:
    """Captured graphs for decodes and for short prompts beside them, plain launches for the rest.

    output [most sequences, V]: where every graph leaves its logits. One for all, since each graph's own would be held
    as long as the graph: half a gigabyte for a vocabulary of 128 thousand.
    """

    def __init__(self, eager: KernelForward, output: Tensor, shapes: Sequence[ShapeKey], capture: Capture) -> None:
        """shapes: what steps are captured for, as `chain` makes them."""
        self.eager, self.shapes = eager, tuple(shapes)
        self.last, self.token_ids = eager.last, eager.token_ids
        self.decode_sizes = batch_sizes(len(output))
        self.mixed_sizes = mixed_sizes(eager.inputs.capacity.tokens, len(output))
        self._output, self._capture = output, capture
        self._graphs: dict[GraphKey, Callable[[], object]] = {}

    def compute(self, step: HostStep, draws: Draws | None = None) -> Computed:
        key = None if draws is None else self.key(step)
        replay = None if key is None else self._graphs.get(key)
        if key is None or replay is None:
            return self.eager.compute(step, draws)
        self.eager.inputs.send(step, key.sizes, key.shape, draws)
        replay()
        count = len(step.logit_rows)
        return Computed(self._output[:count], Sampled(*(it[:count] for it in self.last)))

    def all_logits(self, step: HostStep) -> Tensor:
        return self.eager.all_logits(step)

    def logits_and_hidden(self, step: HostStep) -> tuple[Tensor, Tensor]:
        return self.eager.logits_and_hidden(step)

    def key(self, step: HostStep) -> GraphKey | None:
        """Of the graph that serves this step; None if it is none for a graph."""
        shape = next((shape for shape in self.shapes if shape.covers(step.shape)), None)
        tokens, sequences = len(step.token_ids), len(step.query_lens)
        if shape is None:
            return None
        if step.is_decode:
            fits = bisect_left(self.decode_sizes, tokens)
            if fits == len(self.decode_sizes):
                return None
            return GraphKey(self.decode_sizes[fits], self.decode_sizes[fits], shape)
        for rows, most in self.mixed_sizes:
            if tokens <= rows and sequences <= most:
                return GraphKey(rows, most, shape)
        return None

    def keys(self) -> list[GraphKey]:
        """Every graph that serving can ask for, the largest first: the others fit into its memory."""
        sizes = sorted([*self.mixed_sizes, *((rows, rows) for rows in self.decode_sizes)], reverse=True)
        return [GraphKey(*size, shape) for size in sizes for shape in self.shapes]

    def capture(self, key: GraphKey) -> None:
        """Raises CaptureError."""
        inputs, sizes = self.eager.inputs, key.sizes
        inputs.send(padding_step(inputs.capacity.block_size), sizes, key.shape)
        adapters = ", ".join(f"{name} {size}" for name, size in key.shape._asdict().items() if size)
        try:
            self._graphs[key] = self._capture(lambda: self._compute(sizes, key.shape))
        except RuntimeError as error:  # out of memory is one too
            raise CaptureError(
                f"a step of {key.rows} rows (adapters: {adapters or 'none'}) cannot be captured as a CUDA graph, after "
                f"{len(self._graphs)} others: {_first(error)}. If memory is short, lower kv_cache_bytes or max_running"
            ) from error

    def replay(self, key: GraphKey) -> Callable[[], object]:
        """The graph alone, over what was filled in last."""
        return self._graphs[key]

    @property
    def num_captured(self) -> int:
        return len(self._graphs)

    def _compute(self, sizes: Sizes, shape: ShapeKey) -> None:
        inputs = self.eager.inputs
        logits = self.eager.model(inputs.laid_out(sizes, shape, at_all_sites=True))
        count = len(logits)
        self._output[:count].copy_(logits)
        sample(logits, Parameters(*inputs.draws(count)), out=Sampled(*(it[:count] for it in self.last)))


def chain(kinds: Iterable[ShapeKey]) -> list[ShapeKey]:
    """The shapes that steps are captured for: the base's, and with each kind of part those before it too."""
    shapes = [ShapeKey()]
    for kind in kinds:
        joined = shapes[-1].joined(kind)
        if joined != shapes[-1]:
            shapes.append(joined)
    return shapes


def decode_shapes(max_rank: int, has_experts: bool) -> list[ShapeKey]:
    """What an engine captures: replaced experts, then LoRA, then LoRA in experts, up to this rank.

    Experts first: they cost a step of LoRA a row of the map a token; LoRA's launches would cost them one a site. LoRA
    in experts last: it parts the activation from the product before it.
    """
    kinds = [ShapeKey(experts=int(has_experts)), ShapeKey(rank=max_rank)]
    return chain([*kinds, ShapeKey(expert_rank=max_rank)] if has_experts else kinds)


def _first(error: BaseException) -> BaseException:
    """What went wrong, where ending the capture then failed because of it."""
    while error.__context__ is not None:
        error = error.__context__
    return error
