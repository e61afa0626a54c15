"""Heddle's resident memory by process, beside the bytes that have to be there, run after run of workload A's mixed
batch.

Have to be there: the base's weights, the adapters', and keys and values of all tokens that ran at once. Both processes
map the same libraries, which resident memory counts twice and proportional memory once.
"""

from dataclasses import replace
from pathlib import Path

import psutil

from benchmarks.peers.correctness import Judge
from benchmarks.peers.load import Figures, Load, Sample, Taken, jobs
from benchmarks.peers.models import adapters_bytes, kv_bytes, size_bytes, vocab_size
from benchmarks.peers.rounds import Plan, say, start_all, stop_all
from benchmarks.peers.suites.workload_a import ADAPTERS
from benchmarks.peers.systems.system import Served

TITLE = "memory by part"
RUNS = 6
MiB = 2**20
BEYOND, GROWTH = "RSS beyond, MiB", "growth, last half of the runs, MiB"
END = "at the end"


def run(plan: Plan) -> Taken:
    directory = plan.context.models.get("llama")
    count, tokens, runs = plan.size(64, 8), plan.size(64, 16), plan.size(RUNS, 2)
    asked = [Load(jobs(count, ADAPTERS, vocab_size(directory), 600 + number), tokens) for number in range(runs)]
    most = max(sum(len(job.prompt) + load.new_tokens for job in load.jobs) for load in asked)
    parts = {"weights": size_bytes(directory) / MiB, "adapters": adapters_bytes(directory, ADAPTERS) / MiB,
             "KV of all tokens at once": most * kv_bytes(directory) / MiB}  # fmt: skip
    heddle = [it for it in plan.systems if it == "heddle"]
    taken = Taken()
    running = start_all(plan, Served(directory, ADAPTERS, threads=plan.threads), {"register"}) if heddle else {}
    try:
        for system in running.values():
            taken.samples.append(Sample("heddle", "started", 0, _resident(system.processes())))
            resident: list[float] = []
            for number, load in enumerate(asked):
                answers = system.run(load)
                found = _resident(system.processes())
                resident.append(found["RSS MiB"])
                found |= {BEYOND: resident[-1] - sum(parts.values())}
                if number == runs - 1:
                    found |= {GROWTH: resident[-1] - resident[runs // 2 - 1]}
                say(f"  run {number}: {resident[-1]:.0f} MiB, of which must be there {sum(parts.values()):.0f}")
                taken.samples.append(Sample("heddle", f"after run {number + 1}", 0, found))
                taken.checks.append(Judge(directory).check("heddle", f"after run {number + 1}", load, answers))
            taken.samples.append(Sample("heddle", END, 0, taken.samples[-1].figures))
            taken.checks.append(replace(taken.checks[-1], mode=END))
    finally:
        stop_all(running)
    taken.notes += [f"must be there: {name} {value:.0f} MiB" for name, value in parts.items()]
    return taken


def _resident(processes: list[psutil.Process]) -> Figures:
    found: Figures = {"RSS MiB": sum(it.memory_info().rss for it in processes) / MiB}
    for process in processes:
        name = "engine" if "engine_process" in " ".join(process.cmdline()) else "front"
        for part in ("Rss", "Pss", "Anonymous"):
            found[f"{name} {part} MiB"] = found.get(f"{name} {part} MiB", 0.0) + rollup(process.pid, part) / MiB
    return found


def rollup(pid: int, part: str) -> int:
    """Bytes of one part of its memory, as /proc adds it up."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{part}:"):
            return int(line.split()[1]) * 1024
    return 0
