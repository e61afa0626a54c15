"""Output tokens a second, base only and mixed adapters, over HTTP, beside Transformers with PEFT's mixed batch.

    python -m benchmarks.throughput            # both workloads; rewrites the table in README.md
    python -m benchmarks.throughput --only llama --rounds 1 --no-write
    python -m benchmarks.throughput --threads 1 --cpu-seconds      # on a machine that is busy with other work

All systems run in turns in one run, each round with the same prompts for all of them, since machines are noisy. Figures
are medians of the rounds. A ratio is that of the figures beside it; the range behind it goes from the lowest to the
highest ratio within a round.

Beside other work, threads wait for threads that do not run, and tokens a second say more about that work than about
ours. Tokens a CPU second with one thread each are far steadier there.
"""

import argparse
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.served import NEW_TOKENS, Heddle, OtherWork, Speed
from benchmarks.workload import Job, copy_demo, make_jobs, make_llama

README = Path(__file__).resolve().parent.parent / "README.md"
MARKERS = ("<!-- throughput:begin -->", "<!-- throughput:end -->")
Rounds = dict[str, list[float]]  # output tokens a second of each system, round by round


class Peft:
    """Transformers `generate` on one left-padded batch; adapters by PEFT's `adapter_names`."""

    def __init__(self, directory: Path, adapters: list[str]) -> None:
        import peft
        from transformers import AutoModelForCausalLM

        self._base = AutoModelForCausalLM.from_pretrained(directory / "base", dtype=torch.float32).eval()
        self._model = peft.PeftModel.from_pretrained(self._base, directory / "adapters" / adapters[0], adapters[0])
        for adapter in adapters[1:]:
            self._model.load_adapter(directory / "adapters" / adapter, adapter)
        self._model.eval()

    @torch.inference_mode()
    def measure(self, jobs: list[Job]) -> Speed:
        longest = max(len(job.prompt) for job in jobs)
        ids = torch.tensor([[0] * (longest - len(job.prompt)) + job.prompt for job in jobs])
        mask = torch.tensor([[0] * (longest - len(job.prompt)) + [1] * len(job.prompt) for job in jobs])
        names = {"adapter_names": [job.adapter or "__base__" for job in jobs]}
        start, before = time.perf_counter(), time.process_time()
        self._model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
                             do_sample=False, pad_token_id=0, **names)  # fmt: skip
        tokens = len(jobs) * NEW_TOKENS
        return Speed(tokens / (time.perf_counter() - start), tokens / (time.process_time() - before))


def measure(name: str, directory: Path, rounds: int, requests: int, threads: int, unit: str) -> Rounds:
    """Tokens a `unit` of Speed of `base`, `mixed` and `peft`. Every other round goes through them backwards."""
    adapters = sorted(path.name for path in (directory / "adapters").iterdir())
    loras = [it for it in adapters if (directory / "adapters" / it / "adapter_config.json").exists()]
    vocab = json.loads((directory / "base" / "config.json").read_text())["vocab_size"]
    heddle = Heddle(directory, options=("--threads", str(threads)))
    torch.set_num_threads(threads)
    peft = Peft(directory, loras)
    rows: Rounds = {"base": [], "mixed": [], "peft": []}
    systems: dict[str, Callable[[int], Speed]] = {
        "base": lambda seed: heddle.measure(make_jobs(requests, [], vocab, seed)),
        "mixed": lambda seed: heddle.measure(make_jobs(requests, adapters, vocab, seed)),
        "peft": lambda seed: peft.measure(make_jobs(requests, loras, vocab, seed)),
    }
    try:
        for system in ("base", "mixed"):  # adapters in memory, code paths warm
            systems[system](999)
        for seed in range(rounds):
            for system in reversed(systems) if seed % 2 else systems:
                with OtherWork() as others:
                    speed = systems[system](seed)
                rows[system].append(getattr(speed, unit))
                print(f"{name} round {seed} {system:6} {speed.tokens_per_s:8.1f} tokens/s, "
                      f"{speed.tokens_per_cpu_s:8.1f} a CPU second, "
                      f"{others.share:.0%} of the machine busy with other work", flush=True)  # fmt: skip
    finally:
        heddle.stop()
    return rows


def table(results: dict[str, Rounds], unit: str = "tokens_per_s") -> str:
    tokens = "tok/s" if unit == "tokens_per_s" else "tok/CPU s"
    lines = ["| workload | base only | mixed adapters | mixed / base | PEFT mixed batch | Heddle / PEFT |",
             "|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    for name, rows in results.items():
        base, mixed, peft = (round(statistics.median(rows[system])) for system in ("base", "mixed", "peft"))
        of_base, of_peft = _ratios(rows, "base"), _ratios(rows, "peft")
        lines.append(
            f"| {name} | {base} {tokens} | {mixed} {tokens} | "
            f"{100 * mixed / base:.0f} % ({100 * min(of_base):.0f}–{100 * max(of_base):.0f}) | "
            f"{peft} {tokens} | {mixed / peft:.1f}x ({min(of_peft):.1f}–{max(of_peft):.1f}) |"
        )
    return "\n".join(lines)


def _ratios(rows: Rounds, other: str) -> list[float]:
    """mixed/other of each round."""
    return [mixed / theirs for mixed, theirs in zip(rows["mixed"], rows[other], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("llama", "demo"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each system")
    parser.add_argument("--cpu-seconds", action="store_true", help="count CPU seconds of all processes, not time")
    parser.add_argument("--no-write", action="store_true", help="leave README.md alone")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    unit = "tokens_per_cpu_s" if options.cpu_seconds else "tokens_per_s"
    makers = {"llama": ("random Llama, 8 LoRA (r 8, 16)", make_llama), "demo": ("demo MoE, 4 LoRA + 4 ESFT", copy_demo)}
    results: dict[str, Rounds] = {}
    for key, (name, make) in makers.items():
        if options.only in (None, key):
            with tempfile.TemporaryDirectory() as directory:
                make(Path(directory))
                results[name] = measure(key, Path(directory), options.rounds, options.requests, options.threads, unit)
    print(table(results, unit))
    if not options.no_write:
        text = README.read_text()
        begin, end = MARKERS
        pattern = re.compile(f"{begin}.*?{end}", re.DOTALL)
        README.write_text(pattern.sub(f"{begin}\n{table(results, unit)}\n{end}", text))


if __name__ == "__main__":
    main()
