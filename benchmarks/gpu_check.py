"""Everything that only a GPU can show. benchmarks/gpu/README.md says in which order, and what decides whether to go on.

    python benchmarks/gpu_check.py --section self-test kernels --out DIR    those sections; without it all of them
    python benchmarks/gpu_check.py --list                                   the sections and their limits
    python benchmarks/gpu_check.py --ops lora --once                        each case of one op once, in this process
    python benchmarks/gpu_check.py --toy                                    tiny sizes: does it run? without a GPU too

Each section runs in a process of its own, since a fault leaves a device unusable for the process that met it, and under
a time limit. Rows are in DIR/<section>.jsonl as soon as they are known, tables in DIR/summary.md after each section.
Needs torch with CUDA, triton, transformers and msgspec.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout, not an installed package
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from benchmarks.gpu.processes import run_limited
from benchmarks.gpu.report import ENDED, Row, RowFile, failures, gather_facts, write_summary
from benchmarks.gpu.sections import BY_NAME, OPS, SECTIONS, Section

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    options = _options()
    if options.list:
        for section in SECTIONS:
            print(f"{section.name:10} {section.limit_s:4} s  {section.what}")
        return 0
    facts = gather_facts()
    if facts["driver"] == "":
        if not options.toy:
            print("there is no NVIDIA GPU here; --toy shows whether the check itself runs")
            return 2
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported, here or in a section's process
    if options.once:
        from benchmarks.gpu.section import run_once

        return run_once(tuple(options.ops), options.toy)
    out = options.out or (Path(tempfile.mkdtemp()) if options.toy else RESULTS / _name(facts))
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended too
    sections = [BY_NAME[name] for name in options.section]
    if options.toy:  # which only shows that a section runs; time is measured with nothing beside it
        with ThreadPoolExecutor(2) as pool:
            failed = list(pool.map(lambda section: _run(section, out, facts, options), sections))
        write_summary(out)  # of two sections that ended together, the one that wrote last may have seen less
    else:
        failed = [_run(section, out, facts, options) for section in sections]
    print(out / "summary.md")
    return 1 if any(failed) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [section.name for section in SECTIONS]
    parser.add_argument("--section", nargs="+", default=names, choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--out", type=Path, help="where results go; default: benchmarks/results/gpu-CHIP-DATE")
    parser.add_argument("--list", action="store_true", help="only say which sections there are")
    parser.add_argument("--toy", action="store_true", help="tiny sizes; without a GPU in Triton's interpreter")
    parser.add_argument("--once", action="store_true", help="only compare each case of the ops with its reference")
    parser.add_argument("--ops", nargs="+", default=OPS, choices=OPS, help="of --once")
    return parser.parse_args()


def _name(facts: Row) -> str:
    return f"gpu-{facts['device'].replace(' ', '-')}-{facts['date'][:10]}"


def _run(section: Section, out: Path, facts: Row, options: argparse.Namespace) -> bool:
    """Whether it failed."""
    file, start = RowFile(out, section.name), time.monotonic()
    file.begin(facts)
    print(f"== {section.name}: {section.what} (at most {section.limit_s} s)", flush=True)
    # toy parts are not worth a process each
    groups = [section.parts] if options.toy or not section.parts else [(part,) for part in section.parts]
    commands = [_command(section, group, out, options.toy) for group in groups]
    for group, ending in zip(groups, run_limited(commands, section.limit_s), strict=True):
        row = {ENDED: ending, "seconds": round(time.monotonic() - start, 1)}
        file.append(row | ({"parts": " ".join(group)} if len(groups) > 1 else {}))
    found = failures(file.read())
    for line in found:
        print(f"FAILED {section.name}: {line}", flush=True)
    write_summary(out)
    return bool(found)


def _command(section: Section, parts: tuple[str, ...], out: Path, toy: bool) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.gpu.section", section.name, "--out", str(out.resolve())]
    return command + (["--parts", *parts] if parts else []) + (["--toy"] if toy else [])


if __name__ == "__main__":
    sys.exit(main())
