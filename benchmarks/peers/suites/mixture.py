"""A Qwen3 mixture of 61 million parameters, 16 experts of which a token takes 4: base, 8 ESFT, 8 LoRA on attention,
both.

An ESFT adapter brings experts of its own, and their bytes have to be read whatever computes with them. That floor,
bytes over the machine's bandwidth, is taken off before a ratio to the base is made ("beyond the floor").
"""

from collections import Counter
from collections.abc import Sequence

import torch

from benchmarks.peers.correctness import Judge
from benchmarks.peers.load import Load, Taken, jobs
from benchmarks.peers.machine import read_bandwidth
from benchmarks.peers.models import TUNED, vocab_size
from benchmarks.peers.rounds import Loads, Plan, Turn, interleave, start_all, stop_all
from benchmarks.peers.systems.system import Served
from benchmarks.workload import NUM_ADAPTERS, Job

TITLE = "a mixture of experts: ESFT and LoRA"
LAYERS, EXPERTS, TAKEN, EXPERT_BYTES = 8, 16, 4, 3 * 512 * 256 * 4
ESFT = [f"esft-{index}" for index in range(NUM_ADAPTERS)]
LORA = [f"lora-{index}" for index in range(NUM_ADAPTERS)]
BEYOND = "tok/s beyond the floor"


def run(plan: Plan) -> Taken:
    directory = plan.context.models.get("mixture")
    vocab, count, tokens = vocab_size(directory), plan.size(64, 8), plan.size(64, 16)

    def load(adapters: list[str]) -> Loads:
        return lambda number: Load(jobs(count, adapters, vocab, 300 + number), tokens)

    can = frozenset({"moe"})
    mixed = [name for pair in zip(ESFT[:4], LORA[:4], strict=True) for name in pair]
    turns = [
        Turn("base", load([]), can),
        Turn("8 ESFT", load(ESFT), can, only=("heddle",)),
        Turn("8 LoRA on attention", load(LORA), can, only=("heddle",)),
        Turn("4 ESFT and 4 LoRA", load(mixed), can, only=("heddle",)),
    ]
    served = Served(directory, threads=plan.threads)
    own = {"heddle": Served(directory, [*ESFT, *LORA], esft=True, threads=plan.threads)}
    running = start_all(plan, served, can, own)
    try:
        taken = interleave(plan, running, turns, Judge(directory))
    finally:
        stop_all(running)
    bandwidth = read_bandwidth()
    for sample in taken.samples:
        if sample.system == "heddle":
            _take_off_floor(sample.figures, turns, sample.mode, sample.round, bandwidth)
    for turn in turns:
        read = distinct_bytes(turn.load(0).jobs)
        taken.floors.append({"mode": turn.mode, "distinct expert MB a step": read / 1e6,
                             "ms a step at the machine's bandwidth": 1e3 * read / bandwidth})  # fmt: skip
    taken.notes.append(
        f"memory bandwidth, one large read by {torch.get_num_threads()} threads: {bandwidth / 1e9:.1f} GB/s"
    )
    return taken


def distinct_bytes(asked: Sequence[Job]) -> float:
    """Expected bytes of experts that one step of all these requests has to read, if routing is uniform."""
    missed = 1 - TAKEN / EXPERTS  # by one token, of any expert
    by_adapter = Counter(job.adapter for job in asked)
    distinct = 0.0
    esft = {name: count for name, count in by_adapter.items() if name is not None and name.startswith("esft")}
    plain = len(asked) - sum(esft.values())
    own_share = TUNED / EXPERTS
    # an expert of the base is read unless nobody who shares it wants it; who has tuned it reads its own
    unread = missed**plain
    for count in esft.values():
        unread *= own_share + (1 - own_share) * missed**count
        distinct += TUNED * (1 - missed**count)
    distinct += EXPERTS * (1 - unread)
    return LAYERS * distinct * EXPERT_BYTES


def _take_off_floor(found: dict[str, float], turns: Sequence[Turn], mode: str, number: int, bandwidth: float) -> None:
    """The speed that it would have, were the bytes beyond the base's free: a step a token, all requests in it."""
    loads = {turn.mode: turn.load(number) for turn in turns}
    load = loads[mode]
    more = distinct_bytes(load.jobs) - distinct_bytes(loads["base"].jobs)
    tokens = len(load.jobs) * load.new_tokens
    seconds = tokens / found["tok/s"] - load.new_tokens * more / bandwidth
    found[BEYOND] = tokens / seconds
