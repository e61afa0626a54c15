"""What Prometheus scrapes, without a server."""

from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import generate_latest

from adapters_store.ref import AdapterRef
from server.engine.messages import AdapterOnDevice, Stats
from server.metrics import Metrics


@pytest.fixture
def client() -> Any:
    return SimpleNamespace(stats=Stats(), death=None)


def scraped(metrics: Metrics) -> dict[str, float]:
    lines = generate_latest(metrics.registry).decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_the_engines_numbers_are_those_of_its_last_message(client: Any) -> None:
    metrics = Metrics(client)
    a, b = AdapterRef("a", "0123456789abcdef", "lora"), AdapterRef("b", "f" * 64, "esft")
    on_device = (AdapterOnDevice(a, "resident", 100, 1), AdapterOnDevice(b, "loading", 23, 0))
    assert scraped(metrics)["heddle_requests_running"] == 0
    client.stats = Stats(
        running=2, waiting=3, kv_blocks_used=4, kv_blocks_total=5, prefix_queries=6, prefix_hits=7, preemptions=8,
        steps=9, computed_tokens=10, adapters=on_device,
    )  # fmt: skip
    series = scraped(metrics)
    expected = {
        "heddle_engine_up": 1, "heddle_requests_running": 2, "heddle_requests_waiting": 3, "heddle_kv_blocks_used": 4,
        "heddle_kv_blocks_total": 5, "heddle_prefix_cache_queries_total": 6, "heddle_prefix_cache_hits_total": 7,
        "heddle_preemptions_total": 8, "heddle_engine_steps_total": 9, "heddle_computed_tokens_total": 10,
        "heddle_adapter_bytes_on_device": 123,
        'heddle_adapter_state{adapter="a",revision="0123456789ab",state="resident"}': 1,
        'heddle_adapter_state{adapter="b",revision="ffffffffffff",state="loading"}': 1,
    }  # fmt: skip
    assert {name: series[name] for name in expected} == expected
    client.death = "killed"
    assert scraped(metrics)["heddle_engine_up"] == 0


def test_a_deleted_adapter_leaves_no_series_behind_and_takes_nobody_elses(client: Any) -> None:
    metrics = Metrics(client)
    before = set(scraped(metrics))
    for model in ("kept", "gone"):
        metrics.requests.labels(model, "stop").inc()
        metrics.requests.labels(model, "length").inc()
        metrics.prompt_tokens.labels(model).inc(5)
        metrics.generated_tokens.labels(model).inc(6)
        metrics.time_to_first_token.labels(model).observe(0.3)
        metrics.duration.labels(model).observe(0.4)
    with_both = set(scraped(metrics))
    metrics.forget_model("gone")
    left = set(scraped(metrics))
    assert not any('"gone"' in name for name in left)
    assert {name for name in with_both if '"kept"' in name} == {name for name in left if '"kept"' in name}
    assert len(left - before) * 2 == len(with_both - before)
    metrics.forget_model("gone")  # and once more: nothing is there to drop


def test_two_servers_in_one_process_count_apart(client: Any) -> None:
    first, second = Metrics(client), Metrics(client)
    first.prompt_tokens.labels("base").inc(5)
    assert scraped(first)['heddle_prompt_tokens_total{model="base"}'] == 5
    assert not any("heddle_prompt_tokens_total" in name for name in scraped(second))
