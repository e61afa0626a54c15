"""The kernels whose programs wait for one another, over and over: a race shows as another result or a counter left."""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.gpu.cases import Case, Draw, cases_of
from benchmarks.gpu.cases.case import as_tuple
from benchmarks.gpu.measure import Bench, Clock
from benchmarks.gpu.report import Row

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def replays(bench: Bench) -> Iterator[Row]:
    """Sums are added in a fixed order, so every replay must give the same bits."""
    count = bench.scale.size(2000, 2)
    for op in bench.parts:
        for case in cases_of(op, Draw(bench.scale, bench.scale.dtype, 1)):
            if not case.counters:  # its programs know nothing of one another
                continue
            different, dirty = _replayed(case, bench.clock, count)
            yield {"op": op, "case": case.name, "replays": count, "different": different,
                   "counters left": dirty, "ok": different == dirty == 0}  # fmt: skip


def _replayed(case: Case, clock: Clock, count: int) -> tuple[int, int]:
    """Of `count` replays: how many differed from the first run, and how many left a counter. Counted on the device."""
    first = [_bits(out).clone() for out in as_tuple(case.kernel())]
    found = torch.zeros(2, dtype=torch.int32, device=first[0].device)

    def compute() -> None:
        outs = as_tuple(case.kernel())
        differs = [(_bits(out) != wanted).any() for out, wanted in zip(outs, first, strict=True)]
        left = [counter.any() for counter in case.counters]
        found[0].add_(torch.stack(differs).any().int())
        found[1].add_(torch.stack(left).any().int())

    replay = clock.captured(compute)
    found.zero_()
    for _ in range(count):
        replay()
    different, dirty = found.tolist()
    return different, dirty


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_INTEGERS[tensor.itemsize])
