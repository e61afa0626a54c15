"""Each kernel's time beside the least that anybody could take."""

import traceback
from collections.abc import Iterator

from benchmarks.gpu.cases import Draw, cases_of
from benchmarks.gpu.measure import Bench
from benchmarks.gpu.report import Row
from benchmarks.gpu.sections import OPS


def against_ceilings(bench: Bench) -> Iterator[Row]:
    for op in OPS:
        for case in cases_of(op, Draw(bench.scale, bench.scale.dtype, 1)):
            row: Row = {"op": op, "case": case.name}
            try:
                yield row | bench.timed(case.timed, case.num_bytes, case.num_ops)
            except Exception as error:
                traceback.print_exc()
                yield row | {"failed": f"{type(error).__name__}: {error}"}
