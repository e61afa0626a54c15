"""From a system's start to its first token: installed and converted already, files in the page cache."""

import time

import psutil

from benchmarks.peers.correctness import Judge
from benchmarks.peers.environments import NotInstalled
from benchmarks.peers.load import Load, Sample, Taken, jobs
from benchmarks.peers.models import vocab_size
from benchmarks.peers.openai_stream import Refused
from benchmarks.peers.rounds import Plan, say
from benchmarks.peers.suites.workload_a import ADAPTERS
from benchmarks.peers.systems import create
from benchmarks.peers.systems.system import DidNotStart, Served
from benchmarks.served import OtherWork

TITLE = "start to first token"
_SLOW = ("vllm", "vllm-off")  # minutes for a second figure
MODE = "8 adapters, first token of the base"


def run(plan: Plan) -> Taken:
    directory = plan.context.models.get("llama")
    served = Served(directory, ADAPTERS, threads=plan.threads)
    load = Load(jobs(1, [], vocab_size(directory), 500), 1)
    judge, taken = Judge(directory), Taken()
    for number in range(min(2, plan.rounds)):
        for name in reversed(plan.systems) if number % 2 else plan.systems:
            if name in plan.context.absent or (number and name in _SLOW):
                continue
            system = create(name, plan.context.rooms)
            try:
                system.prepare(served)
                with OtherWork() as others:
                    start = time.perf_counter()
                    system.start(served)
                    answers = system.run(load)
                    seconds = time.perf_counter() - start
                foreign = round(others.share * (psutil.cpu_count() or 1), 2)
                taken.samples.append(Sample(name, MODE, number, {"s": seconds}, foreign))
                taken.checks = [it for it in taken.checks if it.system != name]
                taken.checks.append(judge.check(name, MODE, load, answers))
                say(f"  round {number} {name}: {seconds:.1f} s to the first token")
            except (NotInstalled, DidNotStart, Refused, OSError) as error:
                taken.notes.append(f"{name}: {type(error).__name__}: {error}")
            finally:
                system.stop()
    return taken
