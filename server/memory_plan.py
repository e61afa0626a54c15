"""How the device's memory is shared out before anything is in it: one budget, floors and caps."""

from dataclasses import dataclass

from server.config import LEAST_ADAPTER_BYTES, EngineConfig
from server.errors import ConfigError

_KV_SHARE, _MOST_OF_A_CONTEXT, _ADAPTER_SHARE = 4, 2, 8  # parts of the budget: a quarter, a half, an eighth


@dataclass(frozen=True)
class Wants:
    """What the model's KV cache could come to need, in bytes: for one sequence of the full length, and for as many as
    run together."""

    context: int
    most: int


@dataclass(frozen=True)
class MemoryPlan:
    """In bytes. Each of the two always has its floor, and never more than its cap."""

    budget: int
    kv_floor: int
    kv_cap: int
    adapter_floor: int
    adapter_cap: int


def choose_budget(config: EngineConfig, left: int, is_bounded: bool) -> int:
    """left: bytes that there are for both. is_bounded: more there cannot be (a GPU); else `left` is what is taken where
    the configuration says nothing. Raises ConfigError with the numbers."""
    budget = _budget(config, left, is_bounded)
    if budget < 2 * LEAST_ADAPTER_BYTES:
        raise ConfigError(
            f"there are {max(0, budget):,} bytes for KV blocks and adapters together, and {2 * LEAST_ADAPTER_BYTES:,} "
            "is the least (memory_budget)"
        )
    if config.kv_reserve > budget - LEAST_ADAPTER_BYTES:
        raise ConfigError(
            f"kv_reserve {config.kv_reserve:,} leaves adapters less than {LEAST_ADAPTER_BYTES:,} bytes of "
            f"{budget:,} (memory_budget)"
        )
    if 0 < config.kv_cache_bytes < config.kv_reserve:
        raise ConfigError(
            f"kv_reserve {config.kv_reserve:,} is more than KV blocks may take: {config.kv_cache_bytes:,} "
            "(kv_cache_bytes)"
        )
    return budget


def most_of_adapters(config: EngineConfig, budget: int, is_shared: bool) -> int:
    """What adapters could come to take, before it is known what the model's KV cache needs. is_shared: memory can move
    between the two."""
    if not is_shared and not config.adapter_bytes:
        return budget // _KV_SHARE
    return min(config.adapter_bytes or budget, budget)


def plan_memory(config: EngineConfig, budget: int, adapter_most: int, wants: Wants, is_shared: bool) -> MemoryPlan:
    """adapter_most: as `most_of_adapters` said."""
    kv_most = min(config.kv_cache_bytes or budget, budget - LEAST_ADAPTER_BYTES, wants.most)
    floor = config.kv_reserve or max(budget // _KV_SHARE, min(wants.context, budget // _MOST_OF_A_CONTEXT))
    adapter_cap = max(0, min(adapter_most, budget - min(floor, kv_most)))
    kv_floor = min(kv_most, max(floor, budget - adapter_cap))  # what adapters can never take is nobody else's
    adapter_floor = min(adapter_cap, max(budget - kv_most, budget // _ADAPTER_SHARE))
    kv_cap = min(kv_most, budget - adapter_floor) if is_shared else kv_floor
    return MemoryPlan(budget, min(kv_floor, kv_cap), kv_cap, adapter_floor, adapter_cap)


def _budget(config: EngineConfig, left: int, is_bounded: bool) -> int:
    kv, adapters = config.kv_cache_bytes, config.adapter_bytes
    if is_bounded:
        wanted = config.memory_budget or (kv + adapters if kv and adapters else 0)
        if wanted > left:
            named = "memory_budget" if config.memory_budget else "kv_cache_bytes and adapter_bytes together"
            raise ConfigError(
                f"{named} {wanted:,} does not fit: {left:,} bytes of the device are left beside the model"
            )
        return wanted or left
    if config.memory_budget:
        return config.memory_budget
    # a limit that is set is met, and the other one gets half of what both would have had
    return (kv or left // 2) + (adapters or left // 2)
