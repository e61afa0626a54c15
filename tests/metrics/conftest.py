"""Metrics over a catalogue and a client that hears what a test says, and how their text is read."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from adapters_store.catalog import Catalog
from adapters_store.records import Version, Weights
from server.config import EngineConfig, ServerConfig
from server.engine.client import EngineClient
from server.engine.messages import Event, Stats, StepDone
from server.metrics import Metrics
from tests.support.scrape import Scrape, scraped


class Front:
    """What there is to measure: adapters that are registered, requests, and what the engine says."""

    def __init__(self, most: int, slots: int = 8, base: str = "base") -> None:
        link: Any = None
        self.catalog = Catalog(base)
        self.client = EngineClient(link, link)
        info: Any = SimpleNamespace(adapter_slots=slots, kv_cache_tokens=640)
        self.metrics = Metrics(self.client, self.catalog, info, ServerConfig(EngineConfig("."), metrics_adapters=most))

    def register(self, *names: str, revision: str | None = None) -> None:
        for name in names:
            it = revision or f"{name}-weights"
            change = self.catalog.registered(name, Weights(it, "lora", 1), Version(it, "a", 0), is_durable=True)
            assert change is not None
            self.catalog.apply(change)

    def delete(self, name: str) -> None:
        self.catalog.apply(self.catalog.removed(name))
        self.metrics.forget_model(name)

    def ask(self, model: str, times: int = 1, tokens: int = 3) -> None:
        """Whole requests with a prompt of ten tokens, four of which were in the cache."""
        for _ in range(times):
            it = self.metrics.request(model, 0.0, 10)
            it.begun(10, 4, 0.2)
            for index in range(tokens):
                it.token(1, 1.0 + index / 100)
            it.ended("stop")
            it.over()

    def say(self, *events: Event, stats: Stats | None = None) -> None:
        self.client.hear(StepDone(list(events), stats or self.client.stats))

    def scrape(self) -> Scrape:
        return scraped(self.metrics.exposed().decode())


@pytest.fixture
def front() -> Callable[..., Front]:
    return Front
