"""The demo, which comes with the source: a small mixture, 4 LoRA and 4 ESFT adapters in a batch; PEFT has the LoRA."""

from dataclasses import replace

from benchmarks.peers.correctness import Judge
from benchmarks.peers.load import Load, Taken, jobs
from benchmarks.peers.models import vocab_size
from benchmarks.peers.rounds import Loads, Plan, Turn, interleave, start_all, stop_all
from benchmarks.peers.systems.system import Served
from benchmarks.workload import DEMO

TITLE = "the demo: 4 LoRA and 4 ESFT"


def run(plan: Plan) -> Taken:
    directory = plan.context.models.get("demo")
    loras = [it for it in DEMO if (directory / "adapters" / it / "adapter_config.json").exists()]
    vocab, count, tokens = vocab_size(directory), plan.size(64, 8), plan.size(64, 16)

    def load(adapters: list[str]) -> Loads:
        return lambda number: Load(jobs(count, adapters, vocab, 400 + number), tokens)

    turns = [
        Turn("base", load([]), frozenset({"moe"})),
        Turn("4 LoRA", load(loras), frozenset({"mixed", "moe"})),
        Turn("4 LoRA and 4 ESFT", load(list(DEMO)), frozenset({"esft"})),
    ]
    served = Served(directory, loras, threads=plan.threads)
    beside = [it for it in plan.systems if it in ("heddle", "transformers")]  # others do not know its architecture
    running = start_all(replace(plan, systems=beside), served, {"moe"})
    try:
        return interleave(plan, running, turns, Judge(directory))
    finally:
        stop_all(running)
