"""The engine's own numbers, as of its last message."""

from collections import Counter

from server.engine.client import EngineClient
from server.metrics.exposition import Exposition, labels
from server.metrics.models import OTHER, Models


def expose_engine(client: EngineClient, out: Exposition) -> None:
    stats, memory = client.stats, client.stats.memory
    num_bytes = sum(it.bytes for it in client.on_device)
    gauges = {
        "heddle_engine_up": ("1 while the engine process lives", client.death is None),
        "heddle_requests_running": ("Requests that are being decoded", stats.running),
        "heddle_requests_waiting": ("Requests that wait for room", stats.waiting),
        "heddle_kv_blocks_used": ("KV blocks held by requests", stats.kv_blocks_used),
        "heddle_kv_blocks_total": ("KV blocks in all", stats.kv_blocks_total),
        "heddle_adapter_bytes_on_device": ("Bytes of adapters on the device", num_bytes),
        "heddle_memory_budget_bytes": ("Bytes of the device for KV blocks and adapters", memory.budget_bytes),
        "heddle_memory_kv_bytes": ("Bytes of that budget that KV blocks have", memory.kv_bytes),
        "heddle_memory_adapter_bytes": ("Bytes of that budget that adapters have", memory.adapter_bytes),
        "heddle_memory_host_cache_bytes": ("Bytes of adapters in the host cache", memory.host_bytes),
    }
    for name, (text, value) in gauges.items():
        out.family(name, "gauge", text, [("", value)])
    counters: dict[str, tuple[str, float]] = {
        "heddle_engine_steps_total": ("Steps computed", stats.steps),
        "heddle_computed_tokens_total": ("Tokens computed, prompts and recomputation included", stats.computed_tokens),
        "heddle_preemptions_total": ("Requests preempted for want of KV blocks", stats.preemptions),
        "heddle_prefix_cache_queries_total": ("Prompt tokens looked up in the prefix cache", stats.prefix_queries),
        "heddle_prefix_cache_hits_total": ("Prompt tokens found there", stats.prefix_hits),
        "heddle_masks_total": ("Masks made for tokens of requests with a grammar", stats.masks.made),
        "heddle_mask_seconds_total": ("Seconds of a processor that they took", stats.masks.seconds),
        "heddle_late_masks_total": ("Masks that were not there when their token was due", stats.masks.late),
    }
    for name, (text, count) in counters.items():
        out.family(name, "counter", text, [("", count)])


def expose_places(client: EngineClient, models: Models, out: Exposition) -> None:
    """Where adapters are: a series for each that has its own, and how many of the others are where."""
    states, others = list[tuple[str, float]](), Counter[str]()
    on_device, on_host = Counter[str](), Counter[str]()
    for it in client.on_device:
        name = it.ref.name if models.has_own(it.ref.name) else OTHER
        on_device[name] += it.bytes
        on_host[name] += it.host_bytes
        if name == OTHER:
            others[it.tier.value] += 1
        else:
            states.append((_state(name, it.ref.revision[:12], it.tier.value), 1))
    states += [(_state(OTHER, "", tier), count) for tier, count in sorted(others.items())]
    out.family("heddle_adapter_state", "gauge", "1 for each adapter's state, and how many others are in it", states)
    for family, text, held in (
        ("heddle_adapter_device_bytes", "Bytes of the device that an adapter's pages occupy", on_device),
        ("heddle_adapter_host_cache_bytes", "Bytes of an adapter in the host cache", on_host),
    ):
        told = [(labels({"adapter": name}), held[name]) for name, _ in models.adapters()]
        out.family(family, "gauge", text, told)


def _state(adapter: str, revision: str, state: str) -> str:
    return labels({"adapter": adapter, "revision": revision, "state": state})
