"""What Prometheus scrapes. One object for each server: nothing global, so tests can run many."""

from collections.abc import Callable, Iterable

from adapters_store.catalog import Catalog
from server.config import ServerConfig
from server.engine.client import EngineClient
from server.engine.messages import AdapterMoved, EngineInfo
from server.engine.request import Tier
from server.metrics.counts import Counts
from server.metrics.endpoint_picker import Sizes, expose_to_pickers
from server.metrics.engine import expose_engine, expose_places
from server.metrics.exposition import CONTENT_TYPE, Exposition, labels
from server.metrics.histogram import Histogram
from server.metrics.models import Models
from server.metrics.request import RequestCounts

__all__ = ["CONTENT_TYPE", "Metrics"]

_NUMBERS: tuple[tuple[str, str, Callable[[Counts], int]], ...] = (
    ("heddle_prompt_tokens_total", "Prompt tokens", lambda it: it.prompt_tokens),
    ("heddle_generated_tokens_total", "Generated tokens", lambda it: it.generated_tokens),
    ("heddle_model_prefix_cache_query_tokens_total", "Prompt tokens looked up in the prefix cache",
     lambda it: it.looked_up_tokens),
    ("heddle_model_prefix_cache_hit_tokens_total", "Prompt tokens found there", lambda it: it.cached_tokens),
)  # fmt: skip
_TIMES: tuple[tuple[str, str, Callable[[Counts], Histogram]], ...] = (
    ("heddle_time_to_first_token_seconds", "From the request's arrival to its first token",
     lambda it: it.time_to_first_token),
    ("heddle_inter_token_seconds", "From one token of an answer to the next", lambda it: it.inter_token),
    ("heddle_queue_seconds", "From a request's arrival at the engine until it first ran", lambda it: it.queued),
    ("heddle_request_duration_seconds", "From the request's arrival to its end", lambda it: it.duration),
)  # fmt: skip


class Metrics:
    """By model: the base's or an adapter's name, of which `metrics_adapters` have series (models.py)."""

    def __init__(self, client: EngineClient, catalog: Catalog, info: EngineInfo, config: ServerConfig) -> None:
        self._client, self._catalog = client, catalog
        self._sizes = Sizes(config.engine.block_size, info.kv_cache_tokens, info.adapter_slots)
        self._models = Models(catalog, config.metrics_adapters)
        client.on_device.follow(self._moved)

    def request(self, model: str, arrived: float, prompt_tokens: int) -> RequestCounts:
        """Begin to count an HTTP request, which arrived then (of the monotonic clock)."""
        return RequestCounts(self._models.asked_for(model), arrived, prompt_tokens)

    def forget_model(self, model: str) -> None:
        """The adapter is deleted: its numbers go to those of others."""
        self._models.forget(model)

    def exposed(self) -> bytes:
        """In Prometheus' text format."""
        out = Exposition()
        expose_engine(self._client, out)
        self._expose_models(out)
        expose_places(self._client, self._models, out)
        expose_to_pickers(self._client, self._catalog, self._sizes, out)
        return out.encode()

    def _moved(self, moved: AdapterMoved) -> None:
        counts = self._models.of(moved.ref.name).counts
        counts.evictions += moved.was_evicted
        if moved.load_s is not None and moved.tier is Tier.RESIDENT:  # else only to the host cache
            counts.loads.observe(moved.load_s)

    def _expose_models(self, out: Exposition) -> None:
        models = [(labels({"model": name}), counts) for name, counts in self._models.all()]
        finishes = ((f'finish="{how}",{told}', n) for told, it in models for how, n in sorted(it.requests.items()))
        out.family("heddle_requests_total", "counter", "Completions by model and finish reason", finishes)
        for name, text, number in _NUMBERS:
            out.family(name, "counter", text, ((told, number(it)) for told, it in models))
        for name, text, times in _TIMES:
            out.histograms(name, text, ((told, times(it)) for told, it in models))
        adapters = [(labels({"adapter": name}), counts) for name, counts in self._models.adapters()]
        loads: Iterable[tuple[str, float]] = ((told, sum(it.loads.counts)) for told, it in adapters)
        out.family("heddle_adapter_loads_total", "counter", "Times that it was brought to the device", loads)
        evictions = ((told, it.evictions) for told, it in adapters)
        out.family("heddle_adapter_evictions_total", "counter", "Times that it made room for others", evictions)
        seconds = ((told, it.loads) for told, it in adapters)
        out.histograms("heddle_adapter_load_seconds", "From the start of a load to its end", seconds)
