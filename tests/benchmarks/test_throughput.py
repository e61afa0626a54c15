"""README's table of throughput: its ratios are those of the figures beside them."""

import re

from benchmarks.throughput import table
from benchmarks.workload import make_jobs


def test_ratios_are_those_of_the_shown_medians_with_the_spread_of_the_rounds() -> None:
    # the median of the rounds' ratios is 92 %, which nobody could make out of 1242 and 1255
    rounds = {
        "base": [1255.2, 1350.0, 1100.0],
        "mixed": [1154.8, 1242.0, 1309.0],
        "peft": [500.4, 400.0, 517.0],
    }
    header, rule, row = table({"demo": rounds}).splitlines()
    assert header.count("|") == rule.count("|") == row.count("|")
    assert row == "| demo | 1255 tok/s | 1242 tok/s | 99 % (92–119) | 500 tok/s | 2.5x (2.3–3.1) |"
    assert "| 1255 tok/CPU s |" in table({"demo": rounds}, "tokens_per_cpu_s")


def test_every_shown_ratio_can_be_made_of_the_shown_figures() -> None:
    rounds = {"base": [350.6, 349.0], "mixed": [309.4, 311.0], "peft": [178.5, 179.4]}
    row = table({"one": rounds, "two": rounds}).splitlines()[-1]
    base, mixed, ratio, low, high, peft, times = map(
        float, re.findall(r"[\d.]+", row.partition("|")[2].partition("|")[2])[:7]
    )
    assert ratio == round(100 * mixed / base) and low <= ratio <= high
    assert times == round(mixed / peft, 1)


def test_the_same_seed_asks_the_base_and_the_adapters_for_the_same_work() -> None:
    base, mixed = make_jobs(16, [], 100, seed=3), make_jobs(16, ["a", "b", None], 100, seed=3)
    assert [job.prompt for job in base] == [job.prompt for job in mixed]
    assert {job.adapter for job in base} == {None} and {job.adapter for job in mixed} == {"a", "b", None}
    assert base != make_jobs(16, [], 100, seed=4)
