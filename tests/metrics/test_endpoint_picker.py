"""What an endpoint picker reads: as Gateway API Inference Extension's own scraper does, by name and label."""

import time
from collections.abc import Callable
from typing import Any

from adapters_store.ref import AdapterRef
from server.engine.client import Submission
from server.engine.messages import AdapterMoved, Stats
from server.engine.request import Sampling, Tier

Fronts = Callable[..., Any]


def info(front: Any) -> tuple[str, list[str], list[str]]:
    """Exactly one series, as of now."""
    ((labels, value),) = front.scrape().of("vllm:lora_requests_info")
    assert set(labels) == {"max_lora", "running_lora_adapters", "waiting_lora_adapters"}
    assert abs(value - time.time()) < 5
    running, waiting = (labels[f"{it}_lora_adapters"].split(",") for it in ("running", "waiting"))
    return labels["max_lora"], [it for it in running if it], [it for it in waiting if it]


def ask(front: Any, *refs: AdapterRef) -> Any:
    """What is sent to the engine goes nowhere."""
    front.client._link = front.client._introductions._packages = type("Nowhere", (), {"send": lambda *_: None})()
    for ref in refs:
        front.client._introductions._known[ref] = None
    return front.client.submit([Submission([1], 1, Sampling(), ref, frozenset()) for ref in refs])


def test_the_queue_and_the_cache(front: Fronts) -> None:
    it = front(most=5)
    assert it.scrape().one("vllm:kv_cache_usage_perc") == 0  # before the engine has said anything
    it.say(stats=Stats(running=2, waiting=3, kv_blocks_used=30, kv_blocks_total=40))
    series = it.scrape()
    assert series.one("vllm:num_requests_running") == 2 and series.one("vllm:num_requests_waiting") == 3
    assert series.one("vllm:kv_cache_usage_perc") == 0.75
    assert list(series.of("vllm:cache_config_info")) == [({"block_size": "16", "num_gpu_blocks": "40"}, 1)]


def test_adapters_on_the_device_and_those_that_are_waited_for(front: Fronts) -> None:
    it = front(most=1)  # which bounds other series, and not this one
    assert info(it) == ("8", [], [])
    it.register("b", "a", "loading", "waiting", "cached")
    refs = {name: AdapterRef(name, f"{name}-weights", "lora") for name in ("a", "b", "loading", "waiting", "cached")}
    it.say(*(AdapterMoved(refs[name], Tier.RESIDENT, 1) for name in "ba"))
    it.say(AdapterMoved(refs["loading"], Tier.LOADING, 1), AdapterMoved(refs["cached"], Tier.HOST, 0, 1))
    assert info(it) == ("8", ["a", "b"], [])
    stream = ask(it, refs["a"], refs["waiting"], refs["loading"], refs["waiting"])
    assert info(it) == ("8", ["a", "b"], ["loading", "waiting"])
    it.say(AdapterMoved(refs["waiting"], Tier.RESIDENT, 1), AdapterMoved(refs["b"], Tier.ABSENT, was_evicted=True))
    assert info(it) == ("8", ["a", "waiting"], ["loading"])
    stream.cancel()
    assert info(it) == ("8", ["a", "waiting"], [])


def test_names_are_those_by_which_requests_find_the_weights_now(front: Fronts) -> None:
    it = front(most=5)
    it.register("one", "two", revision="same")
    it.register("before", revision="replaced")
    for revision in ("same", "replaced"):
        it.say(AdapterMoved(AdapterRef("deleted meanwhile", revision, "lora"), Tier.RESIDENT, 1))
    it.delete("before")
    it.register("before", revision="new")
    assert info(it) == ("8", ["one", "two"], [])
    ask(it, AdapterRef("before", "new", "lora"), AdapterRef("two", "same", "lora"))
    assert info(it) == ("8", ["one", "two"], ["before"])
