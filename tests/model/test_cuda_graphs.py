"""Capturing by the rules of torch.cuda, which a fake keeps: what is left behind when a capture fails, above all."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels.adapter_rows import ShapeKey
from server.model.cuda_graphs import CaptureError, CudaCapture, GraphedForward, GraphKey, batch_sizes, chain
from server.model.device_inputs import Capacity, DeviceInputs
from server.model.forward import KernelForward
from server.model.inputs import HostStep, StepInputs


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
    """Of a model whose logits are its token ids and the most rank that it was told of, 2 wide."""

    def model(inputs: StepInputs) -> torch.Tensor:
        ranks = torch.full((len(inputs.token_ids),), inputs.rows.shape.rank)
        return torch.stack([inputs.token_ids, ranks], 1).float()

    inputs = DeviceInputs(Capacity(tokens=16, sequences=4, blocks=4, slices=1), torch.device("cpu"))
    shapes = chain([ShapeKey(rank=max_rank), ShapeKey(experts=experts)])
    return GraphedForward(KernelForward(model, inputs), torch.full((largest, 2), torch.nan), shapes, capture)  # type: ignore[arg-type]


def again(compute: Any) -> Any:
    compute()
    return compute


def decode(*tokens: int, rank: int = 0, experts: int = 0) -> HostStep:
    count = len(tokens)
    return HostStep(
        token_ids=list(tokens),
        positions=[3] * count,
        slot_mapping=[3] * count,
        token_slots=[1] * count,
        query_lens=[1] * count,
        kv_lens=[4] * count,
        block_tables=[[0]] * count,
        sample_rows=list(range(count)),
        logit_rows=list(range(count)),
        shape=ShapeKey(rank, experts),
    )


def test_every_graph_is_known_at_start() -> None:
    sizes = [4, 2, 1]
    assert batch_sizes(4) == sizes[::-1]
    base, lora, everything = ShapeKey(), ShapeKey(64, 0), ShapeKey(64, 1)
    for max_rank, experts, shapes in (
        (64, 0, [base, lora]), (64, 1, [base, lora, everything]), (0, 0, [base]), (0, 1, [base, ShapeKey(0, 1)]),
    ):  # fmt: skip
        keys = forward(max_rank, again, experts).keys()
        assert keys == [GraphKey(n, shape) for n in sizes for shape in shapes]


def test_all_graphs_leave_their_logits_in_one_place() -> None:
    graphed = forward(64, again)
    for key in graphed.keys():
        graphed.capture(key)
    three, one = graphed.logits(decode(5, 6, 7)), graphed.logits(decode(8))
    assert one.tolist() == [[8, 0]]
    assert three.data_ptr() == one.data_ptr() == graphed.logits(decode(9, rank=16)).data_ptr()


def test_a_step_finds_its_graph_or_none() -> None:
    graphed = forward(64, again, experts=1)
    assert graphed.key(decode(5, 6, 7)) == GraphKey(4, ShapeKey())
    assert graphed.key(decode(5, rank=64)) == GraphKey(1, ShapeKey(64, 0))
    assert (
        graphed.key(decode(5, experts=1)) == graphed.key(decode(5, rank=8, experts=1)) == GraphKey(1, ShapeKey(64, 1))
    )
    assert graphed.key(decode(5, rank=65)) is None
    assert forward(0, again, experts=1).key(decode(5, experts=1)) == GraphKey(1, ShapeKey(0, 1))
    assert forward(0, again).key(decode(5, rank=1)) is None
    assert graphed.key(decode(*range(5))) is None
    for key in graphed.keys():
        graphed.capture(key)
    assert graphed.logits(decode(5, rank=16)).tolist() == [[5, 64]]  # room for every rank it was captured for
    assert graphed.logits(decode(5, rank=100)).tolist() == [[5, 100]]
    assert graphed.num_captured == len(graphed.keys())


def test_a_start_fails_with_the_reason() -> None:
    capture = CudaCapture(FakeCuda())

    def fails(compute: Any) -> Any:
        return capture(Work(fails_at=2))

    with pytest.raises(
        CaptureError, match=r"a decode of 4 rows \(adapters: rank 64\) cannot .*: this kernel waits .*max_running"
    ):
        forward(64, fails).capture(GraphKey(4, ShapeKey(64, 0)))
