"""The comparison with peers: what it refuses to print, how it makes ratios, and that it runs to its page."""

import json
import math
import random
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.peers import plots, report
from benchmarks.peers.__main__ import main
from benchmarks.peers.correctness import TIE, Judge
from benchmarks.peers.environments import PROGRAMS, program
from benchmarks.peers.goals import GOALS, outcome
from benchmarks.peers.load import Answer, Check, Load, Sample, Taken, figures, jobs, percentile, poisson
from benchmarks.peers.models import llama
from benchmarks.peers.openai_stream import Refused, read
from benchmarks.peers.suites import SUITES
from benchmarks.peers.suites.mixture import EXPERT_BYTES, EXPERTS, LAYERS, TAKEN, TUNED, distinct_bytes
from benchmarks.peers.summary import ratios
from benchmarks.peers.systems import SYSTEMS
from benchmarks.workload import Job
from tests.support.breadth import always

SPEEDS = {"heddle": (300.0, 100.0, 200.0), "vllm-off": (200.0, 100.0, 100.0)}
SAMPLES = [
    Sample(name, "base", number, {"tok/s": speed}, foreign=0.1)
    for name, speeds in SPEEDS.items()
    for number, speed in enumerate(speeds)
]
HEAD = {"date": "2026-01-01", "command": "c", "commit": "1", "machine": "m", "rounds": 3, "took_s": {}, "versions": {},
        "settings": {"heddle": "", "vllm-off": "", "openvino": "as it comes"}}  # fmt: skip


def checks(vllm_passed: bool = True) -> list[Check]:
    return [Check("heddle", "base", True), Check("vllm-off", "base", vllm_passed)]


def test_a_ratio_is_made_within_a_round() -> None:
    # of the medians it would be 2.0
    assert ratios(SAMPLES, ("heddle", "base"), ("vllm-off", "base"), "tok/s") == (1.5, 1.0, 2.0)
    assert ratios(SAMPLES[:4], ("heddle", "base"), ("vllm-off", "base"), "tok/s") == (1.5, 1.5, 1.5)
    assert ratios(SAMPLES[:3], ("heddle", "base"), ("vllm-off", "base"), "tok/s")[0] is None


def test_a_figure_whose_check_failed_is_not_printed() -> None:
    absent = {"openvino": "NotInstalled: no | such package"}
    right = report.page(HEAD, {"a": Taken(SAMPLES, checks())}, absent, {})
    assert "| base | vllm-off | 3 | 100 (100–200) | 0.10 |" in right and "1.50 (1.00–2.00)" in right
    wrong = report.page(HEAD, {"a": Taken(SAMPLES, checks(False))}, absent, {})
    assert "| base | vllm-off | 3 | failed check | 0.10 |" in wrong and "1.50 (1.00–2.00)" not in wrong
    assert "| a | base over vLLM without LoRA | ≥ 1.05 | – | vllm-off, base: failed check |" in wrong
    assert "| openvino | **did not run** | NotInstalled: no / such package |" in wrong
    # nobody looked: as good as failed
    assert "failed check | 0.10" in report.page(HEAD, {"a": Taken(SAMPLES, [])}, {}, {})


def test_goals_are_met_or_not_or_say_why_nobody_knows() -> None:
    goal = GOALS[0]
    told = outcome(goal, SAMPLES, checks())
    assert (told.value, told.verdict) == (1.5, "met")
    assert outcome(replace(goal, bound=1.6), SAMPLES, checks()).verdict == "**not met**"
    assert outcome(replace(goal, bound=1.6, at_most=True), SAMPLES, checks()).verdict == "met"
    assert outcome(goal, SAMPLES[:3], checks()).verdict == "not measured: vllm-off, base"
    assert {goal.suite for goal in GOALS} <= set(SUITES)


def test_pictures_have_no_bar_where_a_check_failed() -> None:
    assert plots.bars("t", "tok/s", SAMPLES, checks()).count("<rect") == 3  # and the paper
    wrong = plots.bars("t", "tok/s", SAMPLES, checks(False))
    assert wrong.count("<rect") == 2 and "failed check" in wrong
    assert plots.bars("t", "of nobody", SAMPLES, checks()) == ""


@pytest.mark.slow
def test_answers_are_those_of_merged_weights_or_fail(tmp_path: Path) -> None:
    llama(tmp_path, num_adapters=2)
    judge = Judge(tmp_path)
    rng = random.Random(1)
    prompts = [[rng.randrange(4, 8192) for _ in range(20)] for _ in range(4)]
    load = Load([Job(prompt, f"lora-{index % 2}") for index, prompt in enumerate(prompts)], 8)
    right = [Answer(_greedy(judge, job, 8), 0.0, 1.0) for job in load.jobs]
    told = judge.check("x", "mixed", load, right)
    assert told.passed and told.share == 1 and told.tokens == 32
    # the model's answers depend on what it reads, or nothing would be shown
    assert all(len(set(it.tokens)) > 4 for it in right) and len({tuple(it.tokens) for it in right}) == 4
    # a system that leaves adapters out
    base = [Answer(_greedy(judge, replace(job, adapter=None), 8), 0.0, 1.0) for job in load.jobs]
    told = judge.check("x", "mixed", load, base)
    assert not told.passed and told.gap > 10 * TIE and told.first.startswith("request 0 (lora-0), token 0")
    # one that takes another request's adapter, for one request only
    swapped = [replace(right[0], tokens=_greedy(judge, replace(load.jobs[0], adapter="lora-1"), 8)), *right[1:]]
    assert not judge.check("x", "mixed", load, swapped).passed
    # one token wrong, near the end
    last = [*right[:3], replace(right[3], tokens=[*right[3].tokens[:-1], (right[3].tokens[-1] + 1) % 8192])]
    assert not judge.check("x", "mixed", load, last).passed
    short = judge.check("x", "mixed", load, [*right[:3], replace(right[3], tokens=right[3].tokens[:-1])])
    assert not short.passed and short.note == "1 of 4 answers are not 8 tokens"
    assert not judge.check("x", "mixed", load, right[:3]).passed


def _greedy(judge: Judge, job: Job, count: int) -> list[int]:
    tokens: list[int] = []
    with torch.inference_mode():
        for _ in range(count):
            logits = judge._model(job.adapter)(input_ids=torch.tensor([[*job.prompt, *tokens]])).logits
            tokens.append(int(logits[0, -1].argmax()))
    return tokens


def test_figures_are_of_the_whole_run_and_of_each_token() -> None:
    answers = [Answer([1, 2, 3], 0.0, 1.0, [0.5, 0.6, 1.0]), Answer([1], 1.0, 2.0, [2.0])]
    found = figures(answers, cpu_seconds=0.5, rss_mib=7.0)
    assert found["tok/s"] == 2 and found["tok/CPU s"] == 8 and found["RSS MiB"] == 7
    assert found["TTFT p50 ms"] == 750 and found["TTFT p99 ms"] == 1000
    assert found["TPOT p50 ms"] == pytest.approx(250) and found["ITL p99 ms"] == pytest.approx(400)
    assert "TTFT p50 ms" not in figures([*answers, Answer([1], 0.0, 2.0)], 0.5, 7.0)  # one that does not tell
    assert percentile([3, 1, 2], 0.5) == 2 and percentile(range(100), 0.99) == 98 and percentile([5], 0.99) == 5


def test_requests_are_the_same_for_all_and_uniform_ones_are_in_equal_parts() -> None:
    names = [f"lora-{index}" for index in range(4)]
    made = jobs(16, names, 100, seed=3, uniform=True)
    assert set(Counter(job.adapter for job in made).values()) == {4}
    assert [job.prompt for job in made] == [job.prompt for job in jobs(16, [], 100, seed=3)]
    times = poisson(2000, 2.0, seed=1)
    assert times[0] == 0 and times == sorted(times) and times[-1] / 1999 == pytest.approx(0.5, rel=0.1)


def test_a_stream_is_read_as_tokens_with_their_times() -> None:
    def event(text: str) -> bytes:
        return json.dumps({"choices": [{"text": text}]}).encode()

    told = read(0.5, [(1.0, event("<7>")), (1.5, event(" <8> <9>")), (2.0, json.dumps({"choices": []}).encode())])
    assert told.tokens == [7, 8, 9] and told.times == [1.0, 1.5, 1.5] and (told.sent, told.end) == (0.5, 1.5)
    with pytest.raises(Refused, match="engine"):
        read(0.0, [(1.0, event("<7>")), (1.1, json.dumps({"error": {"message": "engine died"}}).encode())])


def test_the_floor_counts_each_expert_that_somebody_reads_once() -> None:
    layer = LAYERS * EXPERT_BYTES
    assert distinct_bytes([Job([], None)]) == pytest.approx(TAKEN * layer)
    assert distinct_bytes([Job([], None)] * 10_000) == pytest.approx(EXPERTS * layer)
    assert distinct_bytes([Job([], "lora-1")] * 64) == distinct_bytes([Job([], None)] * 64)
    assert distinct_bytes([Job([], "esft-1")]) == pytest.approx(TAKEN * layer)
    many = [Job([], f"esft-{index % 8}") for index in range(10_000)]
    assert distinct_bytes(many) == pytest.approx((EXPERTS + 8 * TUNED) * layer)
    assert math.isfinite(distinct_bytes(many))


def test_every_peer_says_what_it_needs() -> None:
    for path in PROGRAMS.glob("*.py"):
        if path.name != "__init__.py":
            assert program(path.stem).package
    assert len({it.name for it in SYSTEMS.values()}) == len(SYSTEMS) and all(it.settings for it in SYSTEMS.values())


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("systems", always([["transformers"], ["heddle", "transformers"]], ["transformers"]), ids=str)
def test_it_runs_to_its_page(tmp_path: Path, systems: list[str]) -> None:
    """Heddle and Transformers, which run in this environment; a peer that cannot be installed is on the page."""
    room = tmp_path / "rooms" / "transformers_generate"
    (room / "bin").mkdir(parents=True)
    (room / ".installed").write_text(json.dumps(program("transformers_generate").needs))
    python = room / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (tmp_path / "rooms" / "openvino_genai").write_text("a file where its room would be")
    asked = ["--quick", "--only", "a", "--peers", ",".join([*systems, "openvino"]), "--rounds", "1", "--threads", "1",
             "--rooms", str(tmp_path / "rooms"), "--results", str(tmp_path / "results"), "--name", "here"]  # fmt: skip
    assert main(asked) == 0
    (page,) = (tmp_path / "results").glob("*-here.md")
    told, text = json.loads(page.with_suffix(".json").read_text()), page.read_text()
    taken = told["suites"]["a"]
    assert {(it["system"], it["mode"]) for it in taken["samples"]} >= {
        (system, mode) for system in systems for mode in ("base", "one adapter", "8 mixed")
    }
    assert all(it["passed"] and it["tokens"] for it in taken["checks"]) and "failed check |" not in text
    assert "openvino" in told["did_not_run"] and "| openvino | **did not run** |" in text
    assert "| a | 8 mixed over PEFT's | ≥ 2.7 |" in text
    assert (page.parent / f"{page.stem}-a.svg").exists()
