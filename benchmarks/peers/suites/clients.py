"""Is our own client honest? The same requests to the same server by it, by OpenAI's client and by AIPerf, in turns."""

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import psutil

from benchmarks.peers.correctness import counted
from benchmarks.peers.environments import PROGRAMS, NotInstalled, python_of
from benchmarks.peers.load import Answer, Figures, Load, Sample, Taken, figures, jobs
from benchmarks.peers.models import vocab_size
from benchmarks.peers.rounds import Plan, say, start_all, stop_all
from benchmarks.peers.suites.workload_a import ADAPTERS
from benchmarks.peers.systems.heddle import HeddleSystem
from benchmarks.peers.systems.system import Served
from benchmarks.served import OtherWork

TITLE = "our client beside others"
OWN, OPENAI, AIPERF = "our client", "the openai package", "AIPerf"
SECONDS = 300


def run(plan: Plan) -> Taken:
    directory = plan.context.models.get("llama")
    running, taken = start_all(plan, Served(directory, ADAPTERS, threads=plan.threads), {"register"}), Taken()
    count, tokens = plan.size(64, 8), plan.size(64, 16)
    clients = [OWN, OPENAI, AIPERF]
    try:
        for system in running.values():
            assert isinstance(system, HeddleSystem)
            for number in range(-1, plan.rounds):
                load = Load(jobs(count, [], vocab_size(directory), 700 + number), tokens)
                for client in clients[:: -1 if number % 2 else 1]:
                    before = system.cpu_seconds()
                    try:
                        with OtherWork() as others:
                            found, got = _ask(plan, client, system, load)
                    except (NotInstalled, OSError, ValueError, subprocess.SubprocessError) as error:
                        clients.remove(client)
                        taken.notes.append(f"{client}: {type(error).__name__}: {error}"[:400])
                        say(taken.notes[-1])
                        continue
                    if number < 0:
                        continue
                    found |= {"tok/CPU s": got / (system.cpu_seconds() - before)}
                    say(f"  round {number} {client}: {found}")
                    foreign = round(others.share * (psutil.cpu_count() or 1), 2)
                    taken.samples.append(Sample("heddle", client, number, found, foreign))
                    taken.checks = [it for it in taken.checks if it.mode != client]
                    taken.checks.append(counted("heddle", client, got, count * tokens))
    finally:
        stop_all(running)
    return taken


def _ask(plan: Plan, client: str, system: HeddleSystem, load: Load) -> tuple[Figures, int]:
    """Its figures, and how many tokens it says that it got."""
    system.forget()  # the others' prompts were the same
    bodies = [system.body(job, load.new_tokens) for job in load.jobs]
    if client == OWN:
        answers = system.run(load)
    elif client == OPENAI:
        answers = _by_openai(plan, system, bodies)
    else:
        return _by_aiperf(plan, system, load, bodies)
    found = figures(answers, 0.0, 0.0)
    return {unit: found[unit] for unit in found if unit != "RSS MiB"}, sum(len(it.tokens) for it in answers)


def _by_openai(plan: Plan, system: HeddleSystem, bodies: list[dict[str, Any]]) -> list[Answer]:
    python = python_of("openai_client", plan.context.rooms)
    asked = json.dumps({"url": f"http://127.0.0.1:{system.port}", "bodies": bodies})
    done = subprocess.run([str(python), "-P", str(PROGRAMS / "openai_client.py")], input=asked, capture_output=True,
                          text=True, timeout=SECONDS)  # fmt: skip
    if done.returncode:
        raise ValueError(done.stderr[-300:])
    return [Answer([0] * len(it["times"]), it["sent"], it["times"][-1], it["times"]) for it in json.loads(done.stdout)]


def _by_aiperf(plan: Plan, system: HeddleSystem, load: Load, bodies: list[dict[str, Any]]) -> tuple[Figures, int]:
    python = python_of("aiperf", plan.context.rooms)
    assert system.served is not None
    base = system.served.directory / "base"
    with tempfile.TemporaryDirectory() as made:
        file = Path(made) / "requests.jsonl"
        texts = [" ".join(f"<{it}>" for it in job.prompt) for job in load.jobs]  # it sends no ids
        file.write_text("".join(json.dumps({"text": it}) + "\n" for it in texts))
        asked = {"max_tokens": load.new_tokens, "temperature": 0, "cache_salt": bodies[0]["cache_salt"]}
        extra = [it for name, value in asked.items() for it in ("--extra-inputs", f"{name}:{value}")]
        command = [str(python), "-P", str(python.parent / "aiperf"), "profile", "--model", "bench-base", "--url",
                   f"http://127.0.0.1:{system.port}", "--endpoint-type", "completions",
                   "--streaming", "--input-file", str(file), "--custom-dataset-type", "single-turn", "--concurrency",
                   str(len(bodies)), "--request-count", str(len(bodies)), "--tokenizer", str(base),
                   "--output-artifact-dir", made, "--ui-type", "none",
                   "--use-server-token-count", *extra]  # fmt: skip
        # offline it looks for tokenizers in the hub's cache alone; this one is a path
        environment = {name: it for name, it in os.environ.items() if name != "HF_HUB_OFFLINE"} | {"HOME": made}
        done = subprocess.run(command, cwd=made, env=environment, capture_output=True, text=True, timeout=SECONDS)
        told = next(Path(made).rglob("profile_export_aiperf.json"), None)
        if told is None:
            raise ValueError(f"AIPerf ended with status {done.returncode}: {(done.stderr or done.stdout)[-300:]}")
        return _read(json.loads(told.read_text()))


def _read(told: dict[str, dict[str, float]]) -> tuple[Figures, int]:
    """In our units."""
    units = {"TTFT p50 ms": ("time_to_first_token", "p50"), "TTFT p99 ms": ("time_to_first_token", "p99"),
             "TPOT p50 ms": ("inter_token_latency", "p50"), "tok/s": ("output_token_throughput", "avg")}  # fmt: skip
    found = {unit: float(told[metric][share]) for unit, (metric, share) in units.items() if metric in told}
    length, count = told["output_sequence_length"]["avg"], told["request_count"]["avg"]
    return found, round(length * count)
