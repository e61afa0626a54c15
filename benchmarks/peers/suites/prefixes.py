"""One long system prompt for each of 8 adapters, which all its requests begin with; prefix caches on.

In `unshared` the same lengths, and nothing in common.
"""

import random
from dataclasses import replace

from benchmarks.peers.correctness import Judge
from benchmarks.peers.load import Load, Taken
from benchmarks.peers.models import vocab_size
from benchmarks.peers.rounds import Loads, Plan, Turn, interleave, start_all, stop_all
from benchmarks.peers.suites.workload_a import ADAPTERS
from benchmarks.peers.systems.system import Served
from benchmarks.workload import Job

TITLE = "one system prompt an adapter"
SYSTEM_TOKENS, OWN_TOKENS, NEW_TOKENS = 512, 32, 16


def run(plan: Plan) -> Taken:
    directory = plan.context.models.get("llama")
    vocab, count = vocab_size(directory), plan.size(64, 8)

    def load(shared: bool) -> Loads:
        def of(number: int) -> Load:
            rng = random.Random(f"prefixes {shared} {number}")
            jobs = []
            for index in range(count):
                adapter = ADAPTERS[index % len(ADAPTERS)]
                common = random.Random(adapter) if shared else rng  # the warm-up has brought them into the caches
                prompt = [common.randrange(4, vocab) for _ in range(SYSTEM_TOKENS)]
                jobs.append(Job([*prompt, *(rng.randrange(4, vocab) for _ in range(OWN_TOKENS))], adapter))
            return Load(jobs, NEW_TOKENS)

        return of

    can = frozenset({"http", "mixed"})
    slow = {"vllm": 2, "llama.cpp": 1}
    turns = [Turn("shared", load(True), can, few=slow), Turn("unshared", load(False), can, few=slow)]
    served = Served(directory, ADAPTERS, threads=plan.threads, prefix_cache=True)
    running = start_all(plan, served, can)
    try:
        # a turn that is taken once more would find all of its prompts
        return interleave(replace(plan, repeats=0), running, turns, Judge(directory))
    finally:
        stop_all(running)
