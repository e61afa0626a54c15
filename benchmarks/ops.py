"""CPU forms of the ops, side by side: thread CPU time on one thread, medians of interleaved rounds.

python -m benchmarks.ops
"""

import random
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels.paged_attention.batch as attention_batch
from kernels.adapter_rows import AdapterTiles, Segment
from kernels.expert_route import Routed
from kernels.grouped_gemm import Layout, down
from kernels.lora import LoraSite, LoraWeights, SiteAdapters, lora
from kernels.paged_attention import AttentionBatch, paged_attention

ROUNDS = 7


def compare(title: str, forms: dict[str, Callable[[], object]]) -> None:
    repeats = {}
    for name, form in forms.items():
        form()
        start = time.thread_time()
        form()
        repeats[name] = max(1, int(0.02 / max(time.thread_time() - start, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(ROUNDS):
        for name, form in forms.items():
            start = time.thread_time()
            for _ in range(repeats[name]):
                form()
            times[name].append((time.thread_time() - start) / repeats[name] * 1e6)
    medians = ", ".join(f"{name} {statistics.median(values):,.0f} us" for name, values in times.items())
    print(f"{title}: {medians}", flush=True)


def lora_forms(tokens: int, width: int, out: int, adapters: int) -> None:
    """Segments (ours) against one product over all live adapters' ranks, with foreign ranks masked."""
    rng = random.Random(0)
    weights = {
        slot: LoraWeights(torch.randn(8 + 8 * (slot % 2), width), torch.randn(out, 8 + 8 * (slot % 2)), 2.0)
        for slot in range(1, adapters + 1)
    }
    site, held = LoraSite((out,)), SiteAdapters({slot: [it] for slot, it in weights.items()})
    popularity = [1 / slot for slot in weights]
    slots = sorted(rng.choices(list(weights), popularity, k=tokens))
    spans = [Segment(slots.index(s), len(slots) - slots[::-1].index(s), s) for s in sorted(set(slots))]
    tiles = AdapterTiles(spans)
    x, y = torch.randn(tokens, width), torch.randn(tokens, out)
    live = [weights[s] for s in sorted(set(slots))]
    all_a = torch.cat([it.a for it in live])
    all_b = torch.cat([it.b * it.scale for it in live], 1)
    owner = torch.cat([torch.full((len(it.a),), s) for s, it in zip(sorted(set(slots)), live, strict=True)])
    mask = (owner[None] == torch.tensor(slots)[:, None]).float()

    def masked() -> Tensor:
        return y.addmm_(F.linear(x, all_a) * mask, all_b.t())

    base = torch.randn(out, width)
    compare(
        f"lora {tokens} tokens, {width}->{out}, {len(live)} adapters",
        {
            "base linear": lambda: F.linear(x, base),
            "segments": lambda: lora(y, x, site, held, tiles, 16),
            "masked": masked,
        },
    )


def attention_forms(sequences: int) -> None:
    """Decodes of 64 to 320 keys in padded groups of several sizes; 1 is one call a sequence."""
    rng = random.Random(0)
    lens = [rng.randint(64, 320) for _ in range(sequences)]
    free = list(range(sequences * 20))
    rng.shuffle(free)
    tables = [[free.pop() for _ in range(-(-length // 16))] for length in lens]
    key_cache, value_cache = torch.randn(2, sequences * 20, 16, 4, 64)
    query = torch.randn(sequences, 8, 64)
    forms: dict[str, Callable[[], object]] = {}
    default = attention_batch.MAX_GROUP
    for size in (1, 2, 4, 8, 16, 64):
        attention_batch.MAX_GROUP = size
        batch = AttentionBatch([1] * sequences, lens, tables, 16, torch.float32)
        batch.plan(None)
        forms[f"groups of {size}"] = lambda batch=batch: paged_attention(query, key_cache, value_cache, batch, 0.125)
    attention_batch.MAX_GROUP = default
    compare(f"attention, {sequences} decodes", forms)


def grouped_forms(tokens: int, used: int, spread: int) -> None:
    """torch's grouped product over all places against a loop over those in use; `spread` places per used one."""
    stack = torch.randn(used * spread, 128, 256)
    places = list(range(0, used * spread, spread))
    counts = [tokens // used] * used
    rows = torch.randn(sum(counts), 256)
    pairs = torch.arange(len(rows))
    tiles = torch.tensor([[place, index * counts[0], counts[0]] for index, place in enumerate(places)])
    routed = Routed(pairs, pairs[:, None], pairs, tiles, torch.tensor([len(tiles)]), len(rows))
    ends = torch.zeros(used * spread, dtype=torch.int32)
    ends[places] = torch.tensor(counts, dtype=torch.int32)
    offsets = ends.cumsum(0, dtype=torch.int32)
    transposed = stack.transpose(1, 2)

    compare(
        f"grouped product, {len(rows)} rows, {used} of {len(stack)} places used",
        {
            "ours": lambda: down(rows, stack, routed, Layout()),
            "torch's grouped": lambda: F.grouped_mm(rows, transposed, offs=offsets),
        },
    )


def main() -> None:
    torch.set_num_threads(1)
    with torch.inference_mode():
        for tokens, width, out in ((64, 512, 512), (64, 512, 1536), (512, 512, 1536)):
            lora_forms(tokens, width, out, adapters=8)
        for sequences in (8, 64):
            attention_forms(sequences)
        for tokens, used, spread in ((32, 16, 1), (256, 16, 1), (256, 16, 4), (256, 16, 32)):
            grouped_forms(tokens, used, spread)


if __name__ == "__main__":
    main()
