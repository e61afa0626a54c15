"""Throughput against the number of adapters: what is asked in a round, and how rounds become points."""

import pytest

from benchmarks.adapter_counts import make_round, summary


def test_a_round_asks_for_prompts_of_the_same_lengths_and_never_for_one_twice() -> None:
    adapters = [f"lora-{index}" for index in range(8)]
    turns = [make_round(16, adapters[:count], 3, turn) for turn, count in enumerate((0, 1, 8, 0))]
    lengths = [[len(job.prompt) for job in jobs] for jobs in turns]
    assert lengths[0] == lengths[1] == lengths[2] == lengths[3]
    assert all(64 <= length <= 256 for length in lengths[0])
    assert lengths[0] != [len(job.prompt) for job in make_round(16, [], 4, 0)]
    prompts = {tuple(job.prompt) for jobs in turns for job in jobs}
    assert len(prompts) == 4 * 16
    assert {job.adapter for job in turns[0]} == {None}
    assert sorted(job.adapter or "" for job in turns[2]) == sorted(adapters * 2)


def test_ratios_are_to_the_base_of_the_same_round() -> None:
    rounds = [
        one_round(base=[90.0, 110.0], adapters={"1": 100.0, "64": 50.0}),
        one_round(base=[200.0, 200.0], adapters={"1": 180.0, "64": 120.0}),
        one_round(base=[50.0, 50.0], adapters={"1": 40.0, "64": 20.0}),
    ]
    base, one, many = summary(rounds)
    assert base["adapters"] == 0 and base["tokens_per_s"] == {"median": 100.0, "lowest": 50.0, "highest": 200.0}
    assert one["of_base"]["tokens_per_s"] == pytest.approx({"median": 0.9, "lowest": 0.8, "highest": 1.0})
    assert many["adapters"] == 64 and many["tokens_per_cpu_s"]["median"] == 25.0
    assert many["of_base"]["tokens_per_cpu_s"] == pytest.approx({"median": 0.5, "lowest": 0.4, "highest": 0.6})


def one_round(base: list[float], adapters: dict[str, float]) -> dict[str, object]:
    """The same in both units, half as much a CPU second: two cores are busy."""
    return {
        unit: {"base": [it / share for it in base], "adapters": {count: it / share for count, it in adapters.items()}}
        for unit, share in (("tokens_per_s", 1), ("tokens_per_cpu_s", 2))
    }
