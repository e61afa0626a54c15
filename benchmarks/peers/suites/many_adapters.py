"""Workload A's requests over 8, 32 and 128 LoRA adapters, by Zipf's law and in equal parts."""

from benchmarks.peers.correctness import Judge
from benchmarks.peers.load import Load, Taken, jobs
from benchmarks.peers.models import vocab_size
from benchmarks.peers.rounds import Loads, Plan, Turn, interleave, start_all, stop_all
from benchmarks.peers.systems.system import Served

TITLE = "more adapters"
MOST = 128


def run(plan: Plan) -> Taken:
    most = plan.size(MOST, 8)
    directory = plan.context.models.get("llama-128" if most == MOST else "llama")
    vocab, count, tokens = vocab_size(directory), plan.size(64, 8), plan.size(64, 16)
    adapters = [f"lora-{index}" for index in range(most)]

    def load(number_of: int, uniform: bool) -> Loads:
        return lambda number: Load(jobs(count, adapters[:number_of], vocab, 200 + number, uniform), tokens)

    can = frozenset({"many"})
    own, small = ("heddle",), plan.size(32, 4)
    turns = [
        Turn("8, Zipf", load(8, False), can, only=own),
        Turn(f"{small}, Zipf", load(small, False), can, few={"vllm": 1, "transformers": 1}),
        Turn(f"{small}, uniform", load(small, True), can, only=own),
        Turn(f"{most}, Zipf", load(most, False), can, only=own),
        Turn(f"{most}, uniform", load(most, True), can, only=own),
    ]
    served = Served(directory, adapters[:small], threads=plan.threads, options=("--adapter-slots", str(most)))
    running = start_all(plan, served, can)
    try:
        return interleave(plan, running, turns, Judge(directory))
    finally:
        stop_all(running)
