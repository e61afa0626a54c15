"""Trains the demo's base model and its twelve adapters from nothing: ``python -m demo.train``.

Stages are ``base`` and the adapters' names; ``--only`` runs some of them, ``--resume`` skips those already on disk.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

from demo.base import train_base
from demo.esft import train_esft
from demo.lora import LORA_CONFIGS, train_lora
from demo.skills import SKILLS

LOG = "training.json"  # seconds, steps and CPU cores per stage
MARKERS = {"lora": "adapter_model.safetensors", "esft": "expert_cfg.json"}


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m demo.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where base/ and adapters/ go")
    parser.add_argument("--only", nargs="+", choices=["base", *SKILLS], metavar="STAGE", help="base or adapter names")
    parser.add_argument("--resume", action="store_true", help="skip stages whose files exist")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1),
                        help="CPU cores: threads for the base, then adapters trained side by side")  # fmt: skip
    return parser.parse_args()


def is_done(stage: str, out: Path) -> bool:
    """Whether a stage's last file is on disk."""
    if stage == "base":
        return (out / "base" / "tokenizer.json").exists()
    return (out / "adapters" / stage / MARKERS[SKILLS[stage].kind]).exists()


def record(out: Path, stage: str, seconds: float, steps: int, cores: int) -> None:
    """Adds a stage to the training log, which the score table quotes."""
    path = out / LOG
    log = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    log[stage] = {"seconds": round(seconds), "steps": steps, "cores": cores}
    order = ["base", *SKILLS]
    log = dict(sorted(log.items(), key=lambda item: order.index(item[0])))
    path.write_text(json.dumps(log, indent=2) + "\n", encoding="utf-8")


def run_adapter(name: str, out: Path, seed: int) -> tuple[int, float]:
    """Trains one adapter in the current process; returns steps and seconds."""
    torch.set_num_threads(1)  # such small matrices get slower with more
    start = time.perf_counter()
    slot = (multiprocessing.current_process()._identity or (1,))[0] - 1  # its own line for the progress bar
    train = train_lora if name in LORA_CONFIGS else train_esft
    with tqdm(total=1, position=slot, leave=True, unit="step") as bar:
        steps = train(name, out / "base", out / "adapters" / name, seed, bar)
    return steps, time.perf_counter() - start


def run_adapters(names: list[str], out: Path, seed: int, jobs: int) -> None:
    """Trains adapters side by side, one process and one thread each."""
    context = multiprocessing.get_context("spawn")
    lock = context.RLock()
    with ProcessPoolExecutor(jobs, context, initializer=tqdm.set_lock, initargs=(lock,)) as pool:
        running: dict[Future[tuple[int, float]], str] = {pool.submit(run_adapter, n, out, seed): n for n in names}
        for future in as_completed(running):
            steps, seconds = future.result()
            record(out, running[future], seconds, steps, cores=1)


def main() -> None:
    """Runs the stages asked for."""
    arguments = parse_arguments()
    out: Path = arguments.out
    stages = arguments.only or ["base", *reversed(SKILLS)]
    if arguments.resume:
        stages = [stage for stage in stages if not is_done(stage, out)]
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    if "base" in stages:
        torch.set_num_threads(arguments.jobs)
        steps = train_base(out / "base", arguments.seed)
        record(out, "base", time.perf_counter() - start, steps, arguments.jobs)
    adapters = [stage for stage in stages if stage != "base"]
    if adapters and not is_done("base", out):
        raise SystemExit(f"no base model in {out / 'base'}: train it first (--only base)")
    if adapters:
        run_adapters(adapters, out, arguments.seed, arguments.jobs)
    print(f"{len(stages)} stages in {(time.perf_counter() - start) / 60:.1f} minutes. Now run: python -m demo.evaluate")


if __name__ == "__main__":
    main()
