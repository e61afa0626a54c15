"""Sizes, clocks, and the two rates that every floor is computed from."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from benchmarks.gpu.report import Row
from server.model.cuda_graphs import CudaCapture

_ROTATED_BYTES = 160 << 20  # touched before memory is touched again: several times an L2 of 50 to 60 MB


@dataclass(frozen=True)
class Scale:
    """Real sizes, or toy sizes, which only show that the check runs."""

    device: torch.device
    is_toy: bool

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Of what is timed."""
        return torch.float32 if self.is_toy else torch.bfloat16

    def size(self, real: int, toy: int) -> int:
        return toy if self.is_toy else real

    def copies(self, num_bytes: int) -> int:
        """How many copies of what a call reads outgrow the caches."""
        return 1 if self.is_toy else max(1, min(128, -(-_ROTATED_BYTES // max(1, num_bytes))))


class Clock:
    """Seconds on a GPU, by events; elsewhere by the wall."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._capture = CudaCapture() if self._is_cuda else None

    def captured(self, compute: Callable[[], object]) -> Callable[[], object]:
        """A graph's replay; without a GPU, the same computation again."""
        if self._capture is not None:
            self._capture.take_new_pool()
            return self._capture(compute)
        compute()
        return compute

    def seconds(self, calls: Sequence[Callable[[], object]], repeats: int = 7) -> float:
        """Of one of `calls`, which do the same on different memory, so that caches do not help more than in a model.

        The median over replays of one graph, where launches cost what they cost in serving.
        """
        rounds = max(1, 16 // len(calls)) if self._is_cuda else 1

        def compute() -> None:
            for _ in range(rounds):
                for call in calls:
                    call()

        replay = self.captured(compute)
        replay()
        return statistics.median(self.events(replay) for _ in range(repeats if self._is_cuda else 1)) / (
            rounds * len(calls)
        )

    def events(self, call: Callable[[], object]) -> float:
        """Seconds on the device between the call's first work and its last."""
        if not self._is_cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


@dataclass
class Bench:
    """What a section is given. parts: of the section, those that this process runs."""

    scale: Scale
    parts: tuple[str, ...] = ()
    clock: Clock = field(init=False)

    def __post_init__(self) -> None:
        self.clock = Clock(self.scale.device)

    @cached_property
    def bandwidth(self) -> float:
        """Bytes a second that a device-to-device copy reads and writes."""
        source = torch.randint(256, (self.scale.size(1 << 30, 1 << 16),), dtype=torch.uint8, device=self.scale.device)
        target = torch.empty_like(source)
        return 2 * len(source) / self.clock.seconds([lambda: target.copy_(source)])

    @cached_property
    def matrix_rate(self) -> float:
        """Operations a second of a large bfloat16 product on random data."""
        size = self.scale.size(8192, 64)
        a, b = (torch.randn(size, size, device=self.scale.device, dtype=torch.bfloat16) for _ in range(2))
        return 2 * size**3 / self.clock.seconds([lambda: a @ b])

    def rates(self) -> Row:
        """What floors are computed from. Before a model: they need memory, and leave none of it taken."""
        row = {"case": "rates", "copy TB/s": self.bandwidth / 1e12, "matrix TFLOP/s": self.matrix_rate / 1e12}
        if self.scale.is_cuda:
            torch.cuda.empty_cache()
        return row

    def timed(self, calls: Sequence[Callable[[], object]], num_bytes: int, num_ops: int = 0) -> Row:
        """Microseconds of one of `calls`, beside the least that anybody could take."""
        seconds = self.clock.seconds(calls)
        by_bytes, by_ops = num_bytes / self.bandwidth, num_ops / self.matrix_rate
        floor = max(by_bytes, by_ops)
        return {"us": seconds * 1e6, "floor us": floor * 1e6, "share of ceiling": floor / seconds,
                "bound by": "bytes" if by_bytes >= by_ops else "matrix rate"}  # fmt: skip
