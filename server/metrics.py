"""What Prometheus scrapes. One registry for each server: nothing global, so tests can run many."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.engine.client import EngineClient

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters by model (the base's or an adapter's name, so bounded by the catalogue) and by how requests ended."""

    def __init__(self, client: EngineClient) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(client))
        labels = ["model"]
        self.requests = Counter(
            "heddle_requests", "Completions by model and finish reason", [*labels, "finish"], registry=self.registry
        )
        self.prompt_tokens = Counter("heddle_prompt_tokens", "Prompt tokens", labels, registry=self.registry)
        self.generated_tokens = Counter("heddle_generated_tokens", "Generated tokens", labels, registry=self.registry)
        self.time_to_first_token = Histogram(
            "heddle_time_to_first_token_seconds", "From the request's arrival to its first token", labels,
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.duration = Histogram(
            "heddle_request_duration_seconds", "From the request's arrival to its end", labels,
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip

    def forget_model(self, model: str) -> None:
        """Drop the series of a deleted adapter, so that their number does not grow with every name ever used."""
        for metric in (self.prompt_tokens, self.generated_tokens, self.time_to_first_token, self.duration):
            metric.remove_by_labels({"model": model})
        self.requests.remove_by_labels({"model": model})


class _EngineCollector(Collector):
    """The engine's own numbers, as of its last message."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client

    def collect(self) -> Iterable[Metric]:
        stats = self._client.stats
        gauges = {
            "heddle_engine_up": ("1 while the engine process lives", self._client.death is None),
            "heddle_requests_running": ("Requests that are being decoded", stats.running),
            "heddle_requests_waiting": ("Requests that wait for room", stats.waiting),
            "heddle_kv_blocks_used": ("KV blocks held by requests", stats.kv_blocks_used),
            "heddle_kv_blocks_total": ("KV blocks in all", stats.kv_blocks_total),
            "heddle_adapter_bytes_on_device": ("Bytes of adapters on the device", sum(a.bytes for a in stats.adapters)),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=value)
        counters = {
            "heddle_engine_steps": ("Steps computed", stats.steps),
            "heddle_computed_tokens": ("Tokens computed, prompts and recomputation included", stats.computed_tokens),
            "heddle_preemptions": ("Requests preempted for want of KV blocks", stats.preemptions),
            "heddle_prefix_cache_queries": ("Prompt tokens looked up in the prefix cache", stats.prefix_queries),
            "heddle_prefix_cache_hits": ("Prompt tokens found there", stats.prefix_hits),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(name, text, value=value)
        resident = GaugeMetricFamily(
            "heddle_adapter_state", "1 for each adapter's state", labels=["adapter", "revision", "state"]
        )
        for adapter in stats.adapters:
            resident.add_metric([adapter.ref.name, adapter.ref.revision[:12], adapter.state], 1)
        yield resident
