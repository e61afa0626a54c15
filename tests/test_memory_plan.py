"""How memory is shared out: who always has what, and what is refused."""

import random

import pytest

from server.config import LEAST_ADAPTER_BYTES, EngineConfig
from server.errors import ConfigError
from server.memory_plan import MemoryPlan, Wants, choose_budget, most_of_adapters, plan_memory

GIB = 1 << 30
MUCH = Wants(context=2 * GIB, most=1000 * GIB)


def planned(left: int = 64 * GIB, wants: Wants = MUCH, is_bounded: bool = True, is_shared: bool = True,
            **settings: int) -> MemoryPlan:  # fmt: skip
    config = EngineConfig(".", **settings)
    budget = choose_budget(config, left, is_bounded)
    return plan_memory(config, budget, most_of_adapters(config, budget, is_shared), wants, is_shared)


def test_without_settings_both_have_a_part_and_the_rest_goes_to_who_needs_it() -> None:
    assert planned() == MemoryPlan(64 * GIB, 16 * GIB, 56 * GIB, 8 * GIB, 48 * GIB)


def test_one_context_always_fits_where_that_is_not_more_than_half() -> None:
    assert planned(wants=Wants(20 * GIB, 1000 * GIB)).kv_floor == 20 * GIB
    assert planned(wants=Wants(40 * GIB, 1000 * GIB)).kv_floor == 32 * GIB


def test_keys_and_values_get_no_more_than_all_running_requests_can_fill() -> None:
    assert planned(wants=Wants(GIB, 10 * GIB)) == MemoryPlan(64 * GIB, 10 * GIB, 10 * GIB, 54 * GIB, 54 * GIB)


def test_a_reserve_is_what_adapters_never_take() -> None:
    it = planned(kv_reserve=40 * GIB)
    assert (it.kv_floor, it.adapter_cap, it.kv_cap) == (40 * GIB, 24 * GIB, 56 * GIB)


def test_both_limits_together_are_a_budget_of_which_nothing_moves() -> None:
    it = planned(left=8 * GIB, kv_cache_bytes=5 * GIB, adapter_bytes=2 * GIB)
    assert it == MemoryPlan(7 * GIB, 5 * GIB, 5 * GIB, 2 * GIB, 2 * GIB)


def test_on_a_host_a_limit_that_is_set_is_met() -> None:
    assert planned(left=8 * GIB, is_bounded=False, adapter_bytes=20 * GIB).budget == 24 * GIB
    it = planned(left=8 * GIB, is_bounded=False, kv_cache_bytes=20 * GIB)
    assert it.budget == 24 * GIB and it.kv_cap == 20 * GIB
    assert planned(left=8 * GIB, is_bounded=False, memory_budget=100 * GIB).budget == 100 * GIB


def test_limits_are_caps_within_a_budget() -> None:
    it = planned(memory_budget=10 * GIB, adapter_bytes=3 * GIB)
    assert (it.adapter_cap, it.kv_floor, it.kv_cap) == (3 * GIB, 7 * GIB, 10 * GIB - (10 * GIB) // 8)


def test_what_cannot_move_is_divided_for_good() -> None:
    it = planned(is_shared=False)
    assert (it.kv_cap, it.kv_floor, it.adapter_cap) == (48 * GIB, 48 * GIB, 16 * GIB)
    assert planned(is_shared=False, adapter_bytes=30 * GIB).kv_cap == 34 * GIB


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory_budget": 65 * GIB}, f"memory_budget {65 * GIB:,} does not fit: {64 * GIB:,} bytes"),
        ({"kv_cache_bytes": 60 * GIB, "adapter_bytes": 5 * GIB}, "kv_cache_bytes and adapter_bytes together"),
        ({"kv_reserve": 64 * GIB}, f"leaves adapters less than 65,536 bytes of {64 * GIB:,}"),
        ({"kv_reserve": 6 * GIB, "kv_cache_bytes": 5 * GIB}, "is more than KV blocks may take"),
        ({"memory_budget": 1000}, "there are 1,000 bytes for KV blocks and adapters together, and 131,072"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(**settings)


def test_whatever_is_set_floors_fit_and_lie_below_caps() -> None:
    rng, count = random.Random(1), 0
    for _ in range(3000):
        settings = {
            name: rng.choice([0, 0, rng.randrange(LEAST_ADAPTER_BYTES, 100 * GIB)])
            for name in ("memory_budget", "kv_reserve", "kv_cache_bytes", "adapter_bytes")
        }
        context = rng.randrange(1, 64 * GIB)
        wants = Wants(context, context * rng.randrange(1, 500))
        is_shared = rng.random() < 0.7
        try:
            it = planned(64 * GIB, wants, rng.random() < 0.5, is_shared, **settings)
        except ConfigError:
            continue
        count += 1
        assert 0 < it.kv_floor <= it.kv_cap and 0 <= it.adapter_floor <= it.adapter_cap
        assert it.kv_floor + it.adapter_floor <= it.budget
        assert it.kv_floor + it.adapter_cap <= it.budget and it.kv_cap + it.adapter_floor <= it.budget
        assert it.kv_cap <= (settings["kv_cache_bytes"] or it.budget)
        assert it.adapter_cap <= (settings["adapter_bytes"] or it.budget)
        if settings["kv_reserve"]:
            assert it.kv_floor >= min(settings["kv_reserve"], wants.most, it.kv_cap)
    assert count > 1000
