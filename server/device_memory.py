"""The device's memory, divided and wired: one budget, adapters' pages, KV blocks (server/memory_plan.py has the rules).

In two steps, since what a KV cache needs is known only when the model has been changed to use it, and by then its
experts are in their arenas.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from server.config import EngineConfig
from server.device import bytes_left, choose_slots, keep_free
from server.engine.kv_cache import KVCache
from server.errors import ConfigError
from server.memory_plan import Wants, choose_budget, most_of_adapters, plan_memory
from server.model.attention import MakeKV
from server.model.probe import KVShape
from server.weights.arena import Arenas, PageWork, VirtualArenas
from server.weights.budget import MemoryBudget
from server.weights.host_arena import HUGE_PAGE_BYTES, host_arenas
from server.weights.kv_memory import IdleBlocks, KVMemory, Layout, SharedKVMemory, WholeKVMemory
from server.weights.page_pool import PagePool

_HUGE_FROM = 32 * HUGE_PAGE_BYTES  # of one tensor: smaller ones would come in too few pieces


class Layer(Protocol):
    """What keeps keys and values."""

    shape: KVShape

    def allocate(self, make: MakeKV) -> None: ...


class DeviceMemory:
    def __init__(self, config: EngineConfig, device: torch.device, arenas: Arenas, weight_bytes: int) -> None:
        """weight_bytes: of the model, which is not on the device yet."""
        self._config, self._device, self._arenas = config, device, arenas
        self._is_shared = isinstance(arenas, VirtualArenas)
        left = bytes_left(device, weight_bytes)
        self.budget = MemoryBudget(choose_budget(config, left, device.type != "cpu"))
        most = most_of_adapters(config, self.budget.total, self._is_shared)
        self.pool = PagePool(self.budget.open("adapters", 0, most), arenas.page_bytes)
        self.num_slots = choose_slots(config, most, weight_bytes, self._is_shared)

    def kv_cache(
        self, layers: Sequence[Layer], length: int, dtype: torch.dtype, do: Callable[[PageWork], None]
    ) -> KVCache:
        """Memory for keys and values in every layer, when the model is on the device. length: of a sequence, at most.
        do: runs page work and returns when it is done."""
        config = self._config
        sizes = [size * dtype.itemsize * config.block_size for layer in layers for size in _elements(layer.shape)]
        block_bytes, blocks_of_one = sum(sizes), -(-length // config.block_size)
        if self._device.type != "cpu" and not config.memory_budget:
            self.budget.total = min(self.budget.total, bytes_left(self._device, 0))
        adapters = self.pool.share
        # at most what all running requests can hold at once: prefixes of earlier ones live in what those leave free
        wants = Wants(blocks_of_one * block_bytes, config.max_running * blocks_of_one * block_bytes)
        plan = plan_memory(config, self.budget.total, adapters.cap, wants, self._is_shared)
        arenas = self._kv_arenas(plan.kv_cap // block_bytes * min(sizes))
        layout = Layout.of(plan.kv_cap, config.block_size, sizes, arenas.page_bytes) if arenas else None
        if layout is None:  # memory is divided for good
            plan = plan_memory(config, self.budget.total, adapters.cap, wants, is_shared=False)
        kv_floor = max(plan.kv_floor, layout.extent_bytes if layout else block_bytes)
        if kv_floor > plan.kv_cap:
            raise ConfigError(
                f"there are {plan.kv_cap:,} bytes for the KV cache, less than one block ({block_bytes:,} bytes); "
                f"adapters may have {plan.adapter_cap:,} of {plan.budget:,} (memory_budget)"
            )
        adapters.floor, adapters.cap = plan.adapter_floor, min(plan.adapter_cap, plan.budget - kv_floor)
        share = self.budget.open("KV blocks", kv_floor, plan.kv_cap)
        memory: KVMemory
        if arenas is None or layout is None:
            num_blocks = num_certain = plan.kv_cap // block_bytes
            memory = WholeKVMemory(num_blocks, config.block_size, dtype, self._device)
            share.take(num_blocks * block_bytes)
        else:
            memory = SharedKVMemory(layout, dtype, share, arenas, do)
            num_blocks = layout.num_blocks
            num_certain = min(num_blocks, kv_floor // layout.extent_bytes * layout.extent_blocks)
        keep_free(self._device, plan.budget if layout else adapters.cap)
        for layer in layers:
            layer.allocate(memory.tensor)
        cache = KVCache(num_blocks, config.block_size, memory, num_certain)
        cache.pool.make_ready(1)  # the first block, which is read when graphs are warmed up
        if layout is not None:
            share.idle = IdleBlocks(cache.pool, layout.least_bytes)
        return cache

    def _kv_arenas(self, tensor_bytes: int) -> VirtualArenas | None:
        """Huge pages on a host, where a tensor has many of them: attention reads all of it, again and again."""
        if not isinstance(self._arenas, VirtualArenas):
            return None
        if self._device.type != "cpu":
            return self._arenas
        return host_arenas(HUGE_PAGE_BYTES) if tensor_bytes >= _HUGE_FROM else host_arenas()


def _elements(shape: KVShape) -> list[int]:
    """Of one token, in each tensor that a layer keeps."""
    return [it for it in (shape.kv_heads * shape.key_dim, shape.kv_heads * shape.value_dim) if it]
