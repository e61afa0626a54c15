"""Capturing by the rules of torch.cuda, which a fake keeps: what is left behind when a capture fails, above all."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kernels.adapter_rows import ShapeKey
from server.model.cuda_graphs import (
    CaptureError,
    CudaCapture,
    GraphedForward,
    GraphKey,
    batch_sizes,
    chain,
    mixed_sizes,
)
from server.model.device_inputs import Capacity, DeviceInputs
from server.model.draws import Draws
from server.model.forward import Computed, KernelForward
from server.model.inputs import HostStep, StepInputs, integers


class FakeGraph:
    def replay(self) -> None: ...


class FakeCuda:
    """Streams and captures as torch.cuda has them: one that fails cannot be ended, and ending raises before the stream
    is restored; its pool cannot be captured into again."""

    def __init__(self) -> None:
        self.stream_now = self.main = SimpleNamespace(name="main", wait_stream=lambda other: None)
        self.pools = 0
        self.stuck: set[int] = set()
        self.captured_into: list[int] = []

    def graph_pool_handle(self) -> int:
        self.pools += 1
        return self.pools

    def Stream(self) -> Any:
        return SimpleNamespace(name="capture", wait_stream=lambda other: None)

    def current_stream(self) -> Any:
        return self.stream_now

    def set_stream(self, stream: Any) -> None:
        self.stream_now = stream

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.stream_now = self.stream_now, stream
        try:
            yield
        finally:
            self.stream_now = before

    def CUDAGraph(self) -> FakeGraph:
        return FakeGraph()

    def graph(self, graph: FakeGraph, pool: int, stream: Any, capture_error_mode: str) -> "_Capturing":
        return _Capturing(self, pool, stream)


class _Capturing:
    def __init__(self, cuda: FakeCuda, pool: int, stream: Any) -> None:
        self._cuda, self._pool, self._stream = cuda, pool, stream

    def __enter__(self) -> None:
        self._cuda.stream_now = self._stream
        if self._pool in self._cuda.stuck:
            raise RuntimeError("the pool is being captured into")
        self._cuda.captured_into.append(self._pool)

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self._cuda.stuck.add(self._pool)
            raise RuntimeError("operation failed due to a previous error during capture")
        self._cuda.stream_now = self._cuda.main


class Work:
    """Something to capture. It is called twice: once to compile, once captured."""

    def __init__(self, fails_at: int = 0) -> None:
        self.calls, self._fails_at = 0, fails_at

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == self._fails_at:
            raise RuntimeError("this kernel waits for the host")


def test_a_capture() -> None:
    cuda, work = FakeCuda(), Work()
    replay = CudaCapture(cuda)(work)
    assert work.calls == 2 and cuda.stream_now is cuda.main
    replay()
    assert work.calls == 2


@pytest.mark.parametrize("fails_at", [1, 2], ids=["while it compiles", "while it is captured"])
def test_a_failed_capture_leaves_the_stream_and_a_pool_that_can_be_used(fails_at: int) -> None:
    cuda = FakeCuda()
    capture = CudaCapture(cuda)
    with pytest.raises(RuntimeError, match="waits for the host|previous error during capture"):
        capture(Work(fails_at))
    assert cuda.stream_now is cuda.main
    assert capture(Work())() is None
    assert cuda.captured_into[-1] not in cuda.stuck


def test_a_capture_that_cannot_even_begin_restores_the_stream() -> None:
    cuda = FakeCuda()
    capture = CudaCapture(cuda)
    cuda.stuck.add(cuda.pools)
    with pytest.raises(RuntimeError, match="being captured"):
        capture(Work())
    assert cuda.stream_now is cuda.main


# -- what is captured ---


def forward(max_rank: int, capture: Any, experts: int = 0, largest: int = 4) -> GraphedForward:
    """Of a model whose logits are as many noughts and one at each row's token, with the most rank that it was told of
    behind them."""

    def model(inputs: StepInputs) -> torch.Tensor:
        tokens = inputs.token_ids[inputs.logit_rows].long()
        ranks = torch.full((len(tokens), 1), inputs.rows.shape.rank / 1000)
        return torch.cat([torch.nn.functional.one_hot(tokens, VOCAB), ranks], 1)

    capacity = Capacity(tokens=80, sequences=4, blocks=4, slices=1, block_size=4)
    inputs = DeviceInputs(capacity, torch.device("cpu"))
    shapes = chain([ShapeKey(rank=max_rank), ShapeKey(experts=experts)])
    output = torch.full((largest, VOCAB + 1), torch.nan)
    return GraphedForward(KernelForward(model, inputs), output, shapes, capture)  # type: ignore[arg-type]


VOCAB = 100


def again(compute: Any) -> Any:
    compute()
    return compute


def step_of(*lanes: tuple[int, ...], rank: int = 0, experts: int = 0, sources: list[int] | None = None) -> HostStep:
    """Of lanes with these tokens, that have nothing before them."""
    lengths = [len(it) for it in lanes]
    ends = integers(lengths).cumsum() - 1
    return HostStep(
        block_size=4,
        token_ids=integers([token for lane in lanes for token in lane]),
        query_lens=integers(lengths),
        kv_lens=integers(lengths),
        slots=integers([0] * len(lanes)),
        block_tables=[[0, 1, 2, 3] for _ in lanes],
        sample_rows=ends,
        logit_rows=ends,
        shape=ShapeKey(rank, experts),
        sources=None if sources is None else integers(sources),
    )


def decode(*tokens: int, **settings: Any) -> HostStep:
    return step_of(*((token,) for token in tokens), **settings)


def draws(count: int) -> Draws:
    nought = np.zeros(count, np.float32)
    return Draws(nought, nought.astype(np.int32), nought, nought, nought)


def computed(graphed: GraphedForward, step: HostStep) -> Computed:
    return graphed.compute(step, draws(len(step.query_lens)))


def test_every_graph_is_known_at_start() -> None:
    sizes = [(64, 4), (4, 4), (2, 2), (1, 1)]
    assert batch_sizes(4) == [1, 2, 4] and mixed_sizes(80, 4) == sizes[:1]
    assert mixed_sizes(2048, 256) == [(64, 32), (128, 64), (256, 128), (384, 192), (512, 256)]
    base, lora, everything = ShapeKey(), ShapeKey(64, 0), ShapeKey(64, 1)
    for max_rank, experts, shapes in (
        (64, 0, [base, lora]), (64, 1, [base, lora, everything]), (0, 0, [base]), (0, 1, [base, ShapeKey(0, 1)]),
    ):  # fmt: skip
        keys = forward(max_rank, again, experts).keys()
        assert keys == [GraphKey(*size, shape) for size in sizes for shape in shapes]


def test_all_graphs_leave_their_logits_in_one_place_and_their_tokens_in_another() -> None:
    graphed = captured(64)
    three, one = computed(graphed, decode(5, 6, 7)), computed(graphed, decode(8))
    assert one.logits.argmax(-1).tolist() == [8] and one.sampled is not None and one.sampled.tokens.tolist() == [8]
    again = computed(graphed, decode(9, rank=16))
    assert three.logits.data_ptr() == one.logits.data_ptr() == again.logits.data_ptr()
    assert graphed.last.tokens[0] == 9 and bool(graphed.last.finite[0])


def test_a_graph_goes_on_with_tokens_that_only_the_device_knows() -> None:
    graphed = captured(64)
    computed(graphed, decode(5, 6, 7))
    assert (it := computed(graphed, decode(0, 0, sources=[2, 0])).sampled) and it.tokens.tolist() == [7, 5]
    mixed = step_of((0,), (11, 12, 13), sources=[1, -1])
    assert graphed.key(mixed) == GraphKey(64, 4, ShapeKey())
    assert (it := computed(graphed, mixed).sampled) and it.tokens.tolist() == [5, 13]
    assert (it := computed(graphed, step_of((0,), (3, 0), sources=[1, 0])).sampled) and it.tokens.tolist() == [13, 5]


def test_a_step_finds_its_graph_or_none() -> None:
    graphed = forward(64, again, experts=1)
    assert graphed.key(decode(5, 6, 7)) == GraphKey(4, 4, ShapeKey())
    assert graphed.key(decode(5, rank=64)) == GraphKey(1, 1, ShapeKey(64, 0))
    everything = GraphKey(1, 1, ShapeKey(64, 1))
    assert graphed.key(decode(5, experts=1)) == graphed.key(decode(5, rank=8, experts=1)) == everything
    assert graphed.key(decode(5, rank=65)) is None
    assert forward(0, again, experts=1).key(decode(5, experts=1)) == GraphKey(1, 1, ShapeKey(0, 1))
    assert forward(0, again).key(decode(5, rank=1)) is None
    assert graphed.key(decode(*range(5))) is None
    assert graphed.key(step_of((1, 2))) == GraphKey(64, 4, ShapeKey())
    assert graphed.key(step_of(tuple(range(64)))) is not None and graphed.key(step_of(tuple(range(65)))) is None
    graphed = captured(64, experts=1)
    assert computed(graphed, decode(5, rank=16)).logits[0, -1] == pytest.approx(0.064)  # room for every captured rank
    eager = computed(graphed, decode(5, rank=100))
    assert eager.logits[0, -1] == pytest.approx(0.1) and eager.sampled is None
    assert graphed.num_captured == len(graphed.keys())


def captured(max_rank: int, experts: int = 0) -> GraphedForward:
    graphed = forward(max_rank, again, experts)
    for key in graphed.keys():
        graphed.capture(key)
    return graphed


def test_a_start_fails_with_the_reason() -> None:
    capture = CudaCapture(FakeCuda())

    def fails(compute: Any) -> Any:
        return capture(Work(fails_at=2))

    with pytest.raises(
        CaptureError, match=r"a step of 4 rows \(adapters: rank 64\) cannot .*: this kernel waits .*max_running"
    ):
        forward(64, fails).capture(GraphKey(4, 4, ShapeKey(64, 0)))
