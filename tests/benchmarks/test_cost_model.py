"""The model's arithmetic, and that what it says of the goals follows from it."""

import pytest

from benchmarks.cost_model import prompts, steps
from benchmarks.cost_model.designs import AFTER, BEFORE, host_seconds
from benchmarks.cost_model.inputs import CHIPS, H200
from benchmarks.cost_model.pages import esft_cost, goals, page
from benchmarks.launches import BASE, LORA, config_of, count_layer

PAGE = """
| engine | running |  | all | messages |
| lists | 32 | greedy | 400 | 5 |
| lists | 128 | greedy | 1,360 | 5 |
| arrays | 32 | greedy | 100 | 5 |
| arrays | 128 | greedy | 196 | 5 |
"""


def test_a_decode_of_32_as_by_hand() -> None:
    """Llama-3.1-8B before: 32 layers of 436 MB in four products, 134 MB of keys and values, 8 small kernels."""
    step = steps.llama(BEFORE, H200, 32)
    assert step.num_bytes == 32 * (2 * 4096 * (6144 + 4096 + 3 * 14336) + 32 * 1024 * 4096) + 2 * 128256 * 4096
    assert step.floor(H200) == pytest.approx(4.489e-3, rel=1e-3)  # 19.3 GB at 4.3 TB/s
    products = 32 * (436.2e6 / (0.85 * 4.3e12) + 4 * 2.5e-6)
    attention = 32 * (134.2e6 / (0.8 * 4.3e12) + 1.2e-6)
    ends = 1050.7e6 / (0.85 * 4.3e12) + 15 * 2.5e-6
    assert step.device == pytest.approx(products + attention + 32 * 8 * 2.5e-6 + ends, rel=1e-3)
    assert steps.llama(AFTER, H200, 32).device == pytest.approx(step.device - (32 * 4 - 1) * 2.5e-6)


def test_launches_are_those_that_are_dispatched() -> None:
    with_lora, mixture = count_layer(config_of("llama"), LORA), count_layer(config_of("deepseek_v2"), BASE)
    assert (AFTER.llama_lora, AFTER.critical, AFTER.llama) == (
        with_lora.total, with_lora.on_critical_path, with_lora.total - with_lora.on_branch
    )  # fmt: skip
    assert mixture.total == AFTER.v2


def test_adapters_cost_their_bytes_at_least() -> None:
    for batch in (1, 8, 32, 128):
        for design in (BEFORE, AFTER):
            base, lora = steps.llama(design, H200, batch), steps.llama(design, H200, batch, 8)
            assert lora.device - base.device > lora.floor(H200) - base.floor(H200) > 0
    assert esft_cost(AFTER, H200, 1, 0.0) == pytest.approx(0.0)


def test_expected_places_in_use() -> None:
    model = steps.V2Lite()
    assert steps.places_in_use(model, 1, 0, 0.0) == pytest.approx(6)
    assert steps.places_in_use(model, 4096, 0, 0.0) == pytest.approx(64)
    assert steps.places_in_use(model, 4096, 20, 0.5) == pytest.approx(64 + 20 * steps.TUNED)


def test_a_prompt_needs_twice_its_active_parameters() -> None:
    one = prompts.v2_lite(AFTER, H200, 1)
    assert one.ops == pytest.approx(2 * 2.45e9, rel=0.02)  # 2.66 billion are active, 0.21 of them the embedding
    assert prompts.v2_lite(AFTER, H200, 2048).share(H200) < H200.tile_share


def test_the_host_is_on_a_line_between_measurements() -> None:
    assert host_seconds(BEFORE, 80, PAGE) == pytest.approx(880e-6)
    assert host_seconds(AFTER, 160, PAGE) == pytest.approx(228e-6)


def test_a_page_says_of_every_goal_whether_it_is_met() -> None:
    rows = goals(H200)[2:]
    assert all(row.endswith(("| met |", "| MISSED |")) for row in rows)
    assert all(row in page("H200", H200) for row in rows) and "H100" in page("H100", CHIPS["H100"])
