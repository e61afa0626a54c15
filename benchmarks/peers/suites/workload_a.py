"""Workload A: a random Llama with 8 LoRA adapters on all linears; 64 requests of 64 to 256 prompt ids, 64 new tokens.

Offline all requests come at once; online they come at random, one a second on average. Adapter i is drawn with a
probability like 1 / (i + 1).
"""

from benchmarks.peers.correctness import Judge
from benchmarks.peers.load import Load, Taken, jobs, poisson
from benchmarks.peers.machine import dense_floor
from benchmarks.peers.models import kv_bytes, parameters, vocab_size
from benchmarks.peers.rounds import Loads, Plan, Turn, interleave, start_all, stop_all
from benchmarks.peers.systems.system import Served
from benchmarks.workload import NUM_ADAPTERS

TITLE = "workload A: one Llama, 8 LoRA adapters"
PER_S = 1.0
ADAPTERS = [f"lora-{index}" for index in range(NUM_ADAPTERS)]


def run(plan: Plan) -> Taken:
    directory = plan.context.models.get("llama")
    served = Served(directory, ADAPTERS, threads=plan.threads)
    running = start_all(plan, served, {"base"})
    try:
        taken = interleave(plan, running, turns(plan, vocab_size(directory)), Judge(directory))
    finally:
        stop_all(running)
    base = turns(plan, vocab_size(directory))[0]
    taken.floors.append(dense_floor(base.load(0), *parameters(directory), kv_bytes(directory)))
    taken.notes.append(
        f"{sum(parameters(directory)) / 1e6:.1f} million parameters, {kv_bytes(directory):,} bytes of KV a token"
    )
    return taken


def turns(plan: Plan, vocab: int) -> list[Turn]:
    count, few, tokens = plan.size(64, 8), plan.size(24, 4), plan.size(64, 16)

    def all_at_once(adapters: list[str]) -> Loads:
        return lambda number: Load(jobs(count, adapters, vocab, number), tokens)

    def coming(adapters: list[str]) -> Loads:
        return lambda number: Load(jobs(few, adapters, vocab, 100 + number), tokens, poisson(few, PER_S, number))

    offline, online = frozenset({"base"}), frozenset({"online"})
    return [
        Turn("base", all_at_once([]), offline),
        Turn("one adapter", all_at_once(ADAPTERS[:1]), frozenset({"one"}), rounds=1),
        Turn("8 mixed", all_at_once(ADAPTERS), frozenset({"mixed"}), few={"llama.cpp": 2}),
        Turn("8 grouped by adapter", all_at_once(ADAPTERS), frozenset({"grouped"})),
        Turn("online, base", coming([]), online, rounds=1),
        Turn("online, 8 mixed", coming(ADAPTERS), online | {"mixed"}, rounds=1),
    ]
