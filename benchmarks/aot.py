"""Compile every shipped kernel configuration ahead of time, without a GPU, and record what it needs.

    python -m benchmarks.aot            compare with the committed table; exit 1 on a difference, a spill, a limit
    python -m benchmarks.aot --write    rewrite the table (benchmarks/results/kernels_aot.md)
    python -m benchmarks.aot --write --also ANOTHER/bin/python    and that of the Triton which that Python has

The pinned Triton (constraints.txt) is the one whose code must not spill. Another one, such as a PyTorch image brings,
has a table of its own (kernels_aot_3.6.md): what spills there is told and fails nothing. A Python that has it:

    python -m venv ANOTHER && ANOTHER/bin/pip install torch numpy && ANOTHER/bin/pip install triton==3.6.0

Registers, stack and local memory are read from the compiled object by the cuobjdump that Triton brings; a spill shows
as stack or local memory. TRITON_INTERPRET must be unset: the decorator decides at import.
"""

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as in every released Triton so far; unset, it warns

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.compiled import OPS
from kernels.compiled.kernel import AMD_STAGES, Configuration

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
RESULTS = Path(__file__).parent / "results"
CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Compiled:
    """What one configuration needs on one target. registers is a thread's; spilled and shared are bytes."""

    op: str
    name: str
    target: str
    registers: int
    shared: int
    spilled: int
    num_warps: int

    @property
    def cell(self) -> str:
        spilled = f" / {self.spilled} spilled" if self.spilled else ""
        return f"{self.registers} / {self.shared / 1024:.1f}{spilled}"

    @property
    def problem(self) -> str | None:
        if self.spilled:
            return f"spills {self.spilled} bytes a thread"
        if self.shared > SHARED_LIMIT[self.target]:
            return f"needs {self.shared:,} bytes of shared memory; there are {SHARED_LIMIT[self.target]:,}"
        return None


def configurations(op: str) -> list[Configuration]:
    return list(importlib.import_module(f"kernels.{op}.kernel").configurations())


def _compile(op: str, index: int, target: str) -> Compiled:
    """A kernel does not travel between processes, its place in the list does."""
    return compile_for(op, configurations(op)[index], target)


def compile_for(op: str, it: Configuration, target: str) -> Compiled:
    num_stages = min(it.num_stages, AMD_STAGES) if target == "gfx942" else it.num_stages
    options = {"num_warps": it.num_warps, "num_stages": num_stages}
    if it.most_registers is not None and target != "gfx942":
        options["maxnreg"] = it.most_registers
    compiled = triton.compile(_source(it), target=TARGETS[target], options=options)
    registers, spilled = _amd_usage(compiled.asm["amdgcn"]) if target == "gfx942" else _usage(compiled.asm["cubin"])
    return Compiled(op, it.name, target, registers, compiled.metadata.shared, spilled, it.num_warps)


def _source(it: Configuration) -> ASTSource:
    """The configuration as Triton's compiler takes it: what an argument's type says is noted by the argument's path."""
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}

    def plain(kind: Any, path: tuple[int, ...]) -> Any:
        if isinstance(kind, tuple):
            return type(kind)(*(plain(member, (*path, index)) for index, member in enumerate(kind)))
        kind, _, found = kind.partition(":")
        if found == "16":
            attributes[path] = [["tt.divisibility", 16]]
        if found != "1":
            return kind
        constants[path] = 1
        return "constexpr"

    signature = {}
    for index, name in enumerate(it.kernel.arg_names):
        if name in it.constants:
            signature[name], constants[(index,)] = "constexpr", it.constants[name]
        else:
            signature[name] = plain(it.types[name], (index,))
    return ASTSource(fn=it.kernel, signature=signature, constexprs=constants, attrs=attributes)


def _usage(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([_CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if usage is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text[:200]!r}")
    return int(usage[1]), int(usage[2]) + int(usage[3])


def _amd_usage(assembly: str) -> tuple[int, int]:
    """Vector registers and scratch bytes, from the assembly's metadata."""
    registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
    scratch = re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)
    if registers is None or scratch is None:
        raise RuntimeError("the assembly has no kernel metadata")
    return int(registers[1]), int(scratch[1])


def problems(rows: list[Compiled]) -> list[str]:
    return [f"{row.op} {row.name} on {row.target} {row.problem}" for row in rows if row.problem]


def pinned_version() -> str:
    """The Triton that CI installs."""
    found = re.search(r"^triton==(\S+)", CONSTRAINTS.read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{CONSTRAINTS.name} pins no triton")
    return found[1]


def table_path(version: str) -> Path:
    """Of a Triton; that of the pinned one needs no version in its name."""
    minor = ".".join(version.split(".")[:2])
    return RESULTS / ("kernels_aot.md" if version == pinned_version() else f"kernels_aot_{minor}.md")


def as_table(rows: list[Compiled]) -> str:
    """One line a configuration: registers a thread and kilobytes of shared memory on each target."""
    by_name: dict[tuple[str, str], dict[str, Compiled]] = {}
    for row in rows:
        by_name.setdefault((row.op, row.name), {})[row.target] = row
    targets = [target for target in TARGETS if any(target in found for found in by_name.values())]
    wrong = problems(rows)
    limits = ", ".join(f"{SHARED_LIMIT[name] // 1024} on {name}" for name in targets)
    told = f"{len(wrong)} of {len(rows)} spill or pass one:" if wrong else f"None of {len(rows)} spills or passes one."
    lines = [f"Triton {triton.__version__}: registers a thread / KB of shared memory a program. Limits of the "
             f"latter: {limits}. {told}", "", *(f"- {it}" for it in wrong), *([""] if wrong else []),
             f"| op | configuration | {' | '.join(targets)} |", f"|---|---|{'---:|' * len(targets)}"]  # fmt: skip
    for (op, name), found in by_name.items():
        cells = [found[it].cell if it in found else "" for it in targets]
        lines.append(f"| {op} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="rewrite the committed table")
    parser.add_argument(
        "--also", nargs="+", default=(), metavar="PYTHON", help="do the same with other Pythons' Triton"
    )
    parser.add_argument("--ops", nargs="+", default=OPS, choices=OPS)
    parser.add_argument("--targets", nargs="+", default=tuple(TARGETS), choices=tuple(TARGETS))
    options = parser.parse_args()
    status = _run(options)
    same = ["--ops", *options.ops, "--targets", *options.targets, *(["--write"] if options.write else [])]
    for python in options.also:
        command = [python, "-m", "benchmarks.aot", *same]
        status |= subprocess.run(command, cwd=CONSTRAINTS.parent, env=os.environ | {"PYTHONPATH": "."}).returncode
    return status


def _run(options: argparse.Namespace) -> int:
    """Exit status."""
    work = [
        (op, index, target)
        for op in options.ops
        for index, it in enumerate(configurations(op))
        for target in options.targets
        if target in it.targets
    ]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(_compile, *zip(*work, strict=True), chunksize=8))
    table, path = as_table(rows), table_path(triton.__version__)
    print(table)
    is_pinned, wrong = triton.__version__ == pinned_version(), problems(rows)
    print("\n".join(wrong) or f"{len(rows)} compiled by Triton {triton.__version__}, none spills or passes a limit")
    if wrong and is_pinned:
        return 1
    is_whole = set(options.ops) == set(OPS) and set(options.targets) == set(TARGETS)
    if options.write and is_whole:
        path.write_text(table)
    elif is_whole and not (path.exists() and path.read_text() == table):
        print(f"{path.name} is out of date: run with --write")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
