"""What picks a server for a request: the model server protocol of Kubernetes' Gateway API Inference Extension, which
llm-d speaks too. The names are vLLM's, since that is what such pickers read unless they are told otherwise.

https://github.com/kubernetes-sigs/gateway-api-inference-extension, docs/proposals/003-model-server-protocol
"""

import time
from collections.abc import Iterable
from itertools import islice
from typing import NamedTuple

from adapters_store.catalog import Catalog
from adapters_store.ref import AdapterRef
from server.engine.client import EngineClient
from server.engine.request import Tier
from server.metrics.exposition import Exposition, labels

MOST_NAMES = 16  # of one set of weights


class Sizes(NamedTuple):
    """What does not change while a server runs: sizes are labels, and each value of a label is a series for ever."""

    block_size: int  # tokens
    kv_cache_tokens: int
    adapter_slots: int


def expose_to_pickers(client: EngineClient, catalog: Catalog, sizes: Sizes, out: Exposition) -> None:
    stats = client.stats
    used = stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
    for name, text, value in (
        ("vllm:num_requests_waiting", "Requests that wait for room", stats.waiting),
        ("vllm:num_requests_running", "Requests that are being decoded", stats.running),
        ("vllm:kv_cache_usage_perc", "KV blocks held by requests, as a part of all: 0 to 1", used),
    ):
        out.family(name, "gauge", text, [("", value)])
    num_blocks = sizes.kv_cache_tokens // sizes.block_size
    cache = labels({"block_size": str(sizes.block_size), "num_gpu_blocks": str(num_blocks)})
    out.family("vllm:cache_config_info", "gauge", "The size of the KV cache", [(cache, 1)])
    resident = _names((it.ref for it in client.on_device if it.tier is Tier.RESIDENT), catalog)
    waiting = {it.name for it in client.adapters_asked_for() if client.on_device.of(it).tier is not Tier.RESIDENT}
    told = labels(
        {
            "max_lora": str(sizes.adapter_slots),
            "running_lora_adapters": ",".join(sorted(resident)),
            "waiting_lora_adapters": ",".join(sorted(waiting - resident)),
        }
    )
    heard = time.time() - client.silence_s
    text = "Adapters on the device, and those that requests wait for; the value is when that was so, in Unix seconds"
    out.family("vllm:lora_requests_info", "gauge", text, [(told, heard)])


def _names(refs: Iterable[AdapterRef], catalog: Catalog) -> set[str]:
    """What requests can call these weights now. Names hold no commas: the catalogue sees to that."""
    return {record.name for ref in refs for record in islice(catalog.meaning(ref.revision), MOST_NAMES)}
