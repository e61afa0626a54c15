"""Everything that only a GPU can show, in one command of less than nine minutes:

    python benchmarks/gpu_check.py                       all sections; results to benchmarks/results/
    python benchmarks/gpu_check.py --ops lora --once     each case of one op once (for compute-sanitizer)
    TRITON_INTERPRET=1 python benchmarks/gpu_check.py --toy    toy sizes in the interpreter: does the script run?

Sections are in the order of what matters most if the run is cut: kernels against their references; the arena; each
kernel's time beside its ceiling; an ESFT model; a LoRA model; adapters swapped under load; the oracle. Needs torch with
CUDA, triton, transformers, safetensors and msgspec; neither FastAPI nor pydantic.
"""

import argparse
import contextlib
import gc
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout, not an installed package
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch

import server.model  # noqa: F401  # before Transformers' model code (server/kernels_name.py)
from benchmarks.gpu import oracle
from benchmarks.gpu.cases import Case, Cases
from benchmarks.gpu.measure import Clock, Report, Scale, copy_bandwidth, facts, matrix_rate
from benchmarks.gpu.serving import Serving
from benchmarks.gpu.swap import swap_under_load
from kernels.compiled import OPS, everywhere

RESULTS = Path(__file__).parent / "results"
Rows = list[dict[str, Any]]


class Check:
    def __init__(self, scale: Scale, report: Report, ops: tuple[str, ...]) -> None:
        self._scale, self._report, self._ops = scale, report, ops
        self._clock = Clock(scale.device)
        self.failures: list[str] = []

    def run(self) -> None:
        facts_ = self._report.facts
        facts_["copy_bytes_per_s"] = self._bandwidth = copy_bandwidth(self._scale, self._clock)
        facts_["matrix_ops_per_s"] = self._matrix_rate = matrix_rate(self._scale, self._clock)
        sections: list[tuple[str, Callable[[], Rows]]] = [
            ("kernels against their references", self.correctness),
            ("arena", self.arena),
            ("kernels against their ceilings", self.ceilings),
            ("DeepSeek-V2-Lite with ESFT adapters", self.esft),
            ("Llama-3.1-8B with LoRA adapters", self.lora),
            ("adapters swapped under load", lambda: swap_under_load(self._scale, self._clock)),
            ("oracle", lambda: oracle.check(self._scale)),
        ]
        for title, section in sections:
            self._section(title, section)

    def _section(self, title: str, section: Callable[[], Rows]) -> None:
        """A section that fails is a row of the report; the others still run."""
        start = time.perf_counter()
        print(f"== {title}", flush=True)
        try:
            rows = section()
        except Exception as error:
            traceback.print_exc()
            rows = [{"failed": f"{type(error).__name__}: {error}"}]
        for row in rows:
            print("  ", "  ".join(f"{key} {value:,.4g}" if isinstance(value, float) else f"{key} {value}"
                                  for key, value in row.items()), flush=True)  # fmt: skip
        self.failures += [f"{title}: {row}" for row in rows if row.get("failed") or row.get("ok") is False]
        self._report.add(title, rows, time.perf_counter() - start)
        gc.collect()  # an engine's parts know each other
        if self._scale.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, self._scale.device)
            torch.cuda.empty_cache()

    def correctness(self) -> Rows:
        rows: Rows = []
        dtypes = (torch.float32,) if self._scale.is_toy else (torch.float32, torch.bfloat16)
        for dtype in dtypes:
            for op in self._ops:
                for case in self._cases(op, dtype, int(time.time()), rows):
                    with self._noted(case, rows):
                        error = case.error()
                        rows.append({"op": op, "case": case.name, "dtype": str(dtype).removeprefix("torch."),
                                     "error": error, "allowed": case.tolerance,
                                     "ok": error <= case.tolerance})  # fmt: skip
        return rows

    def _cases(self, op: str, dtype: torch.dtype, seed: int, rows: Rows) -> Iterator[Case]:
        """Of one op; what stops them from being made is a row."""
        try:
            yield from Cases(self._scale, dtype, seed).of(op)
        except Exception as error:
            traceback.print_exc()
            rows.append({"op": op, "case": "making the cases", "failed": f"{type(error).__name__}: {error}"})

    @contextlib.contextmanager
    def _noted(self, case: Case, rows: Rows) -> Iterator[None]:
        """One case that fails is a row, and the others still run."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            rows.append({"op": case.op, "case": case.name, "failed": f"{type(error).__name__}: {error}"})

    def arena(self) -> Rows:
        if self._scale.device.type != "cuda":
            return [{"skipped": "needs a GPU"}]
        from server.weights.gpu_self_test import self_test

        return [self_test(self._scale.device.index or 0)]

    def ceilings(self) -> Rows:
        rows: Rows = []
        dtype = torch.float32 if self._scale.is_toy else torch.bfloat16
        for op in self._ops:
            for case in self._cases(op, dtype, 1, rows):
                seconds = None
                with self._noted(case, rows):
                    seconds = self._clock.seconds(case.timed)
                if seconds is None:
                    continue
                by_bytes, by_ops = case.num_bytes / self._bandwidth, case.num_ops / self._matrix_rate
                rows.append({"op": op, "case": case.name, "us": seconds * 1e6, "floor us": max(by_bytes, by_ops) * 1e6,
                             "share of ceiling": max(by_bytes, by_ops) / seconds,
                             "bound by": "bytes" if by_bytes >= by_ops else "matrix rate"})  # fmt: skip
        return rows

    def esft(self) -> Rows:
        size = self._scale.size
        serving = Serving("DeepSeek-V2-Lite", self._scale, self._clock, kv_cache_bytes=size(12 << 30, 1 << 22),
                          adapter_bytes=size(60 << 30, 1 << 26), adapter_slots=20, max_experts_per_adapter=size(8, 2),
                          max_running=size(256, 4), tokens_per_step=size(2048, 16),
                          max_model_len=size(4096, 64))  # fmt: skip
        rows: Rows = []
        context, tuned = size(1024, 9), size(6, 2)
        base: dict[int, tuple[float, int]] = {}
        resident = 0
        for adapters in (0, 1, 2, 3, 4, 10, 20):
            serving.add_esft(adapters - resident, tuned)
            resident = adapters
            if adapters in (1, 2, 3, 20):
                rows.append(self._memory_row(serving, adapters))
            if adapters in (2, 3):
                continue
            for batch in (1, 8, 32, 128, 256) if not self._scale.is_toy else (2,):
                plan = serving.decodes(batch, context, adapters)
                rows.append(self._decode_row(serving, plan, f"{adapters} ESFT", batch, base))
        rows.append(
            self._decode_row(serving, serving.decodes(size(32, 2), context, 0), "base, 20 resident", size(32, 2), base)
        )
        rows.append({"case": "prefill", "tokens": size(2048, 12),
                     "device ms": serving.time(serving.prefill(size(2048, 12))).device * 1e3})  # fmt: skip
        rows.append(self._launches(serving))  # last: a profiler that was attached slows what follows
        return rows

    def lora(self) -> Rows:
        size = self._scale.size
        serving = Serving("Llama-3.1-8B", self._scale, self._clock, kv_cache_bytes=size(40 << 30, 1 << 22),
                          adapter_bytes=size(40 << 30, 1 << 26), adapter_slots=128, max_running=size(256, 4),
                          tokens_per_step=size(2048, 16), max_model_len=size(4096, 64))  # fmt: skip
        rows: Rows = []
        context = size(1024, 9)
        base: dict[int, tuple[float, int]] = {}
        resident = 0
        for adapters, ranks in ((0, (16,)), (1, (16,)), (8, (16,)), (32, (8, 16, 32, 64)), (128, (8, 16, 32, 64))):
            if self._scale.is_toy and adapters > 8:
                break
            serving.add_lora(adapters - resident, ranks)
            resident = adapters
            for batch in (1, 8, 32, 128) if not self._scale.is_toy else (2,):
                plan = serving.decodes(batch, context, adapters)
                rows.append(self._decode_row(serving, plan, f"{adapters} LoRA", batch, base))
        rows.append(
            self._decode_row(serving, serving.decodes(size(32, 2), context, 0), "base, all resident", size(32, 2), base)
        )
        rows.append({"case": "prefill", "tokens": size(2048, 12),
                     "device ms": serving.time(serving.prefill(size(2048, 12))).device * 1e3})  # fmt: skip
        rows.append(self._launches(serving))  # last: a profiler that was attached slows what follows
        return rows

    def _decode_row(self, serving: Serving, plan: list[Any], name: str, batch: int,
                    base: dict[int, tuple[float, int]]) -> dict[str, Any]:  # fmt: skip
        taken, floor = serving.time(plan), serving.floor_bytes(plan)
        base.setdefault(batch, (taken.device, floor))
        base_seconds, base_floor = base[batch]
        over_base = taken.device / base_seconds
        return {"case": name, "batch": batch, "device ms": taken.device * 1e3, "wall ms": taken.wall * 1e3,
                "floor ms": floor / self._bandwidth * 1e3, "over base": over_base,
                "floor over base": floor / base_floor, "beyond the floor": over_base / (floor / base_floor) - 1,
                "tokens/s": batch / taken.wall}  # fmt: skip

    def _memory_row(self, serving: Serving, adapters: int) -> dict[str, Any]:
        """KV tokens that a device of this size has left: adapters here, or a merged copy of the model for each."""
        info = serving.info
        per_token = info.kv_cache_bytes / info.kv_cache_tokens
        total = self._report.facts["memory_bytes"] * 0.9
        here = (total - serving.weight_bytes - serving.adapter_bytes) / per_token
        merged = (total - serving.weight_bytes * max(1, adapters)) / per_token
        return {"case": f"memory, {adapters} adapters", "adapter bytes": serving.adapter_bytes,
                "KV tokens left": int(here), "with merged copies": max(0, int(merged))}  # fmt: skip

    def _launches(self, serving: Serving) -> dict[str, Any]:
        """Kernels that one eager decode step launches."""
        plan = serving.decodes(self._scale.size(8, 2), self._scale.size(64, 5), 0)
        if self._scale.device.type != "cuda":
            serving.eager(plan)
            return {"case": "launches", "skipped": "needs a GPU"}
        serving.eager(plan)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            serving.eager(plan)
            torch.cuda.synchronize()
        kernels = torch.autograd.DeviceType.CUDA
        launches = sum(
            event.count for event in profile.key_averages()
            if event.device_type == kernels and not event.key.startswith(("Memcpy", "Memset"))
        )  # fmt: skip
        layers = serving.model.config.num_hidden_layers
        return {"case": "launches of a base decode", "in all": launches, "a layer": launches / layers}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", default=OPS, choices=OPS)
    parser.add_argument("--once", action="store_true", help="only run each case of the ops once, and compare")
    parser.add_argument("--toy", action="store_true", help="toy sizes")
    parser.add_argument("--out", type=Path, default=None, help="where results go; default: benchmarks/results")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.toy:
        print("no GPU here; --toy under TRITON_INTERPRET=1 shows whether the script runs")
        return 2
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    scale = Scale(device, options.toy)
    out = options.out or (Path(tempfile.mkdtemp()) if options.toy else RESULTS)
    found = facts(scale)
    report = Report(out, f"gpu_{found['device'].replace(' ', '_')}_{found['date'][:10]}", found)
    check = Check(scale, report, tuple(options.ops))
    with everywhere():  # for --toy; a GPU's tensors go through kernels anyway
        if options.once:
            rows = check.correctness()
            print("\n".join(map(str, rows)))
            return 0 if all(row.get("ok") for row in rows) else 1
        check.run()
    print(f"{out / report.name}.md")
    for failure in check.failures:
        print("FAILED", failure)
    return 1 if check.failures else 0


if __name__ == "__main__":
    sys.exit(main())
