"""What Prometheus scrapes, without a server."""

import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters_store.ref import AdapterRef
from server.engine.messages import AdapterMoved, MaskStats, Memory, Stats
from server.engine.request import Tier
from server.metrics import models as models_module
from server.metrics.activity import MOST_KNOWN, RANK_EVERY_S
from server.metrics.exposition import Exposition, labels
from server.metrics.histogram import Histogram
from tests.support.scrape import Scrape, scraped

Fronts = Callable[..., Any]
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "operations.md").read_text()
BY_MODEL = (
    "heddle_requests_total", "heddle_prompt_tokens_total", "heddle_generated_tokens_total",
    "heddle_model_prefix_cache_query_tokens_total", "heddle_model_prefix_cache_hit_tokens_total",
    "heddle_time_to_first_token_seconds_count", "heddle_time_to_first_token_seconds_sum",
    "heddle_inter_token_seconds_count", "heddle_inter_token_seconds_bucket", "heddle_queue_seconds_count",
    "heddle_request_duration_seconds_count",
)  # fmt: skip
BY_ADAPTER = ("heddle_adapter_loads_total", "heddle_adapter_evictions_total", "heddle_adapter_load_seconds_sum")


def ref(name: str) -> AdapterRef:
    return AdapterRef(name, f"{name}-weights", "lora")


def test_the_engines_numbers_are_those_of_its_last_message(front: Fronts) -> None:
    it = front(most=5)
    assert it.scrape().one("heddle_requests_running") == 0
    stats = Stats(
        running=2, waiting=3, kv_blocks_used=4, kv_blocks_total=5, prefix_queries=6, prefix_hits=7, preemptions=8,
        steps=9, computed_tokens=10, memory=Memory(11, 12, 13, 14), masks=MaskStats(15, 1.5, 16),
    )  # fmt: skip
    it.say(AdapterMoved(ref("a"), Tier.RESIDENT, 100), AdapterMoved(ref("b"), Tier.LOADING, 23), stats=stats)
    expected = {
        "heddle_engine_up": 1, "heddle_requests_running": 2, "heddle_requests_waiting": 3, "heddle_kv_blocks_used": 4,
        "heddle_kv_blocks_total": 5, "heddle_prefix_cache_queries_total": 6, "heddle_prefix_cache_hits_total": 7,
        "heddle_preemptions_total": 8, "heddle_engine_steps_total": 9, "heddle_computed_tokens_total": 10,
        "heddle_adapter_bytes_on_device": 123, "heddle_memory_budget_bytes": 11, "heddle_memory_kv_bytes": 12,
        "heddle_memory_adapter_bytes": 13, "heddle_memory_host_cache_bytes": 14,
        "heddle_masks_total": 15, "heddle_mask_seconds_total": 1.5, "heddle_late_masks_total": 16,
    }  # fmt: skip
    series = it.scrape()
    assert {name: series.one(name) for name in expected} == expected
    it.client.declare_dead("killed")
    assert it.scrape().one("heddle_engine_up") == 0


def test_a_request_is_counted_for_its_model(front: Fronts) -> None:
    it = front(most=5)
    it.register("a")
    it.ask("base")
    it.ask("a", times=2, tokens=5)
    series = it.scrape()
    for name, of_base, of_a in [
        ("heddle_prompt_tokens_total", 10, 20), ("heddle_generated_tokens_total", 3, 10),
        ("heddle_model_prefix_cache_query_tokens_total", 10, 20), ("heddle_model_prefix_cache_hit_tokens_total", 4, 8),
        ("heddle_time_to_first_token_seconds_count", 1, 2), ("heddle_time_to_first_token_seconds_sum", 1, 2),
        ("heddle_queue_seconds_count", 1, 2), ("heddle_request_duration_seconds_count", 1, 2),
        ("heddle_inter_token_seconds_count", 2, 8),
    ]:  # fmt: skip
        assert (series.one(name, model="base"), series.one(name, model="a")) == (of_base, of_a), name
    assert series.one("heddle_requests_total", model="a", finish="stop") == 2
    assert series.one("heddle_inter_token_seconds_sum", model="a") == pytest.approx(0.08)
    at_most = {labels["le"]: value for labels, value in series.of("heddle_inter_token_seconds_bucket", model="a")}
    assert at_most["0.005"] == 0 and at_most["0.015"] == at_most["+Inf"] == 8


def test_several_completions_have_their_own_times_between_tokens_and_one_first_token(front: Fronts) -> None:
    it = front(most=5)
    counts = it.metrics.request("base", 10.0, 5)
    for number, at in [(1, 10.5), (2, 10.6), (1, 11.5), (2, 10.8)]:
        counts.token(number, at)
    series = it.scrape()
    assert series.one("heddle_time_to_first_token_seconds_sum") == pytest.approx(0.5)
    assert series.one("heddle_inter_token_seconds_sum") == pytest.approx(1.2)
    assert series.one("heddle_inter_token_seconds_count") == 2


def test_loads_and_evictions_and_where_adapters_are(front: Fronts) -> None:
    it = front(most=2)
    it.register("a", "b", "c")
    for name, tier in (("a", Tier.RESIDENT), ("b", Tier.HOST), ("c", Tier.RESIDENT)):
        it.say(AdapterMoved(ref(name), Tier.LOADING), AdapterMoved(ref(name), Tier.RESIDENT, 70, load_s=0.2))
        it.say(AdapterMoved(ref(name), tier, 70, 30, load_s=9.0 if tier is Tier.HOST else None))
    it.say(AdapterMoved(ref("d"), Tier.RESIDENT, 1000))  # no name means it any more
    series = it.scrape()
    assert list(series.of("heddle_adapter_state")) == [
        ({"adapter": "a", "revision": "a-weights", "state": "resident"}, 1),
        ({"adapter": "b", "revision": "b-weights", "state": "host"}, 1),
        ({"adapter": "other", "revision": "", "state": "resident"}, 2),
    ]
    by_adapter = {"a": 1, "b": 1, "other": 1}
    for name in ("heddle_adapter_loads_total", "heddle_adapter_load_seconds_count"):
        assert {labels["adapter"]: value for labels, value in series.of(name)} == by_adapter
    assert series.one("heddle_adapter_device_bytes", adapter="other") == 1070
    assert series.one("heddle_adapter_host_cache_bytes", adapter="a") == 30
    assert series.sum("heddle_adapter_device_bytes") == series.one("heddle_adapter_bytes_on_device") == 1210
    it.say(AdapterMoved(ref("a"), Tier.ABSENT, was_evicted=True))
    series = it.scrape()
    assert series.one("heddle_adapter_evictions_total", adapter="a") == 1
    assert not list(series.of("heddle_adapter_state", adapter="a"))
    assert series.one("heddle_adapter_device_bytes", adapter="a") == 0


# -- a bounded number of series ---


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    made = models_module.Activity
    monkeypatch.setattr(models_module, "Activity", lambda _: made(lambda: now[0]))
    return now


def with_series(series: Scrape) -> set[str]:
    return series.values("heddle_prompt_tokens_total", "model") - {"base", "other"}


def sums(series: Scrape) -> dict[str, float]:
    told = {name: series.sum(name) for name in (*BY_MODEL, *BY_ADAPTER)}
    return told | {
        f"{name} {it}": series.sum(name, **{label: it})
        for name, label in (("heddle_requests_total", "finish"), ("heddle_inter_token_seconds_bucket", "le"))
        for it in series.values(name, label)
    }


def test_the_most_active_have_series_and_the_others_one_together(front: Fronts, clock: list[float]) -> None:
    it = front(most=2)
    it.register("a", "b", "c", "d")
    for name, times in (("a", 3), ("b", 1), ("c", 9), ("d", 5)):
        it.ask(name, times)
    assert with_series(it.scrape()) == {"a", "b"}  # who came first
    assert it.scrape().one("heddle_prompt_tokens_total", model="other") == 140
    clock[0] += RANK_EVERY_S
    it.ask("a")
    series = it.scrape()
    assert with_series(series) == {"c", "d"}
    assert series.one("heddle_prompt_tokens_total", model="other") == 190  # with a's last
    assert series.one("heddle_prompt_tokens_total", model="c") == 0  # from now on
    clock[0] += RANK_EVERY_S
    it.ask("a", 3)
    assert with_series(it.scrape()) == {"c", "d"}  # 7 of a's are not so many more than 5 of d's
    it.ask("a", 3)
    clock[0] += RANK_EVERY_S
    it.ask("a")
    assert with_series(it.scrape()) == {"a", "c"}


def test_what_was_asked_for_long_ago_counts_little(front: Fronts, clock: list[float]) -> None:
    it = front(most=1)
    it.register("old", "new")
    it.ask("old", 1000)
    for _ in range(20):
        clock[0] += 300
        it.ask("new")
    assert with_series(it.scrape()) == {"new"}
    clock[0] += 3e6  # five weeks, in which nobody asked: beyond what a float can hold
    it.ask("old")
    clock[0] += RANK_EVERY_S
    it.ask("old")
    assert with_series(it.scrape()) == {"old"}
    assert all(map(math.isfinite, it.metrics._models._activity._scores.values()))


def test_one_that_goes_on_while_its_adapter_loses_its_series_is_counted_all_the_same(
    front: Fronts, clock: list[float]
) -> None:
    it = front(most=1)
    it.register("a", "b")
    under_way = it.metrics.request("a", 0.0, 10)
    under_way.token(1, 1.0)
    it.ask("b", 5)
    clock[0] += RANK_EVERY_S
    it.ask("b")
    under_way.token(1, 2.0)
    under_way.ended("length")
    series = it.scrape()
    assert with_series(series) == {"b"}
    assert series.one("heddle_requests_total", model="other", finish="length") == 1
    assert series.one("heddle_inter_token_seconds_sum", model="other") == pytest.approx(1 + 5 * 0.02)


def test_a_deleted_adapter_leaves_its_numbers_to_the_others_and_its_place_too(front: Fronts) -> None:
    it = front(most=2)
    it.register("kept", "gone", "next")
    for name in ("kept", "gone", "next"):
        it.ask(name)
    before = it.scrape()
    it.delete("gone")
    it.delete("gone" if "gone" in it.catalog else "next")
    after = it.scrape()
    assert with_series(before) == {"kept", "gone"} and with_series(after) == {"kept"}
    assert sums(before) == sums(after)
    it.ask("gone")  # it was on its way
    it.say(AdapterMoved(ref("gone"), Tier.ABSENT, was_evicted=True))
    assert with_series(it.scrape()) == {"kept"}
    it.register("late")
    it.ask("late")
    assert with_series(it.scrape()) == {"kept", "late"}


@pytest.mark.parametrize("base", ["base", "other"])
def test_an_adapter_or_a_base_called_other_is_told_once(front: Fronts, base: str) -> None:
    it = front(most=3, base=base)
    it.register(*({"a", "other"} - {base}))
    for name in (base, "other", "a"):
        it.ask(name)
    it.delete("a")
    series = it.scrape()
    assert with_series(series) == set() and series.sum("heddle_prompt_tokens_total") == 30


@pytest.mark.parametrize("most", [0, 7])
def test_a_burst_through_many_adapters_leaves_few_series_and_no_sum_goes_down(
    front: Fronts, clock: list[float], most: int
) -> None:
    it, rng = front(most=most), random.Random(most)
    names = [f"adapter-{index}" for index in range(6000)]
    it.register(*names)
    before = sums(it.scrape())
    for round in range(20):
        for name in rng.choices(names, k=400) + rng.choices(names[20:40], k=100):
            it.ask(name, tokens=2)
            it.say(AdapterMoved(ref(name), Tier.RESIDENT, 10, load_s=0.1), AdapterMoved(ref(name), Tier.HOST, 0, 10))
        if round % 5 == 4:
            it.delete(min(with_series(it.scrape()), default=names[round]))
        clock[0] += 20
        series = it.scrape()
        now = sums(series)
        assert all(now[name] >= value for name, value in before.items())
        assert len(with_series(series)) <= most and len(series.samples) < 150 + 130 * (most + 2)
        before = now
    assert before["heddle_prompt_tokens_total"] == 20 * 500 * 10
    assert before["heddle_adapter_loads_total"] == 20 * 500
    assert with_series(series) <= set(names[20:40])
    assert len(it.metrics._models._activity) <= MOST_KNOWN


# -- the format ---


def test_names_follow_prometheus_rules(front: Fronts) -> None:
    it = front(most=1)
    it.register("a")
    it.ask("a")
    kinds = dict(line.split()[2:] for line in it.metrics.exposed().decode().splitlines() if line.startswith("# TYPE"))
    kept = {"heddle_kv_blocks_total"}  # a gauge that was named before this was looked at
    for name, kind in kinds.items():
        assert (":" in name) == name.startswith("vllm:") and name == name.lower()
        assert name.endswith("_total") == (kind == "counter") or name in kept, name
        assert kind != "histogram" or name.endswith("_seconds")
        assert not name.endswith(("_count", "_sum", "_bucket", "_ms", "_milliseconds", "_kb", "_mb"))


def test_the_page_for_operators_names_each_with_its_labels(front: Fronts) -> None:
    it = front(most=1)
    it.register("a")
    it.ask("a")
    it.say(AdapterMoved(ref("a"), Tier.RESIDENT))
    exposed = dict[str, set[str]]()
    for name, its, _ in it.scrape().samples:
        exposed.setdefault(re.sub("_seconds_(bucket|count|sum)$", "_seconds", name), set()).update(its.keys() - {"le"})
    rows = [line.split("|") for line in PAGE.splitlines() if line.startswith(("| `heddle_", "| `vllm:"))]
    told = {name: set(re.findall("`(.+?)`", row[2])) for row in rows for name in re.findall("`(.+?)`", row[1])}
    assert told == exposed


def test_whatever_a_label_holds_is_read_back() -> None:
    out, strange = Exposition(), 'a"b\\c\nd,e}é'
    out.family("x", "gauge", "of x", [(labels({"b": strange, "a": ""}), 0.1), ("", math.inf)])
    assert [(its, value) for _, its, value in scraped(out.encode().decode()).samples] == [
        ({"a": "", "b": strange}, 0.1), ({}, math.inf),
    ]  # fmt: skip


def test_a_histogram_counts_what_is_at_most_its_bound() -> None:
    it = Histogram((0.1, 1))
    for value in (0.0, 0.1, 0.11, 1.0, 1.01, 99.0):
        it.observe(value)
    twice = Histogram((0.1, 1))
    twice.add(it)
    twice.add(it)
    assert it.counts == [2, 2, 2] and twice.counts == [4, 4, 4] and twice.sum == pytest.approx(2 * it.sum)
