"""The self-check: silent where ours compute what Transformers computes, and not where they compute anything else."""

import importlib

import pytest
import torch
from transformers.masking_utils import create_chunked_causal_mask, sliding_window_causal_mask_function

from server.cli import parser
from server.commands.serve import config_of
from server.model.families import UnsupportedModelError
from server.model.masks import LayerMask, Visible
from server.model.probe import PROBE
from server.model.self_check import SelfCheckFailed
from server.model.spread import Spread
from tests.support.engine_harness import Engine
from tests.support.tiny_models import MODELS, make_model
from tests.support.wrong_models import WRONG, WRONG_IN_FLOAT32, Wrong, attention_sees, spoiled

FEW = ("rope of other pairs", "a longer window ignored", "gate and up the other way round")
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


def checked(name: str, dtype: torch.dtype, seed: int = 0, **settings: object) -> float:
    """What was found, as a part of what is allowed."""
    engine = Engine(make_model(name, attention=PROBE, seed=seed).to(dtype), self_check=True, **settings)
    it = engine.assembly.info.self_checked
    assert it is not None
    engine.engine.check()  # its blocks are free again
    assert engine.assembly.kv_cache.pool.num_held == 0
    return it.found / it.allowed


def refusal(wrong: Wrong, dtype: torch.dtype) -> str:
    with spoiled(wrong.spoil), pytest.raises(SelfCheckFailed) as refused:
        model = make_model(wrong.model, attention=PROBE, **wrong.model_settings).to(dtype)
        Engine(model, self_check=True, **wrong.engine_settings)
    return str(refused.value)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("wrong", [it for it in WRONG if it.what in FEW], ids=lambda it: f"{it.what}, {it.model}")
def test_what_is_wrong_is_refused(wrong: Wrong, dtype: torch.dtype) -> None:
    says = refusal(wrong, dtype)
    assert "rounding explains" in says and "--no-self-check" in says and "at position" in says


@pytest.mark.thorough
@pytest.mark.parametrize("wrong", WRONG_IN_FLOAT32, ids=lambda it: f"{it.what}, {it.model}")
def test_whatever_is_wrong_is_refused(wrong: Wrong) -> None:
    refusal(wrong, FLOAT32)


@pytest.mark.thorough
@pytest.mark.parametrize("wrong", WRONG, ids=lambda it: f"{it.what}, {it.model}")
def test_whatever_is_wrong_is_refused_in_few_bits(wrong: Wrong) -> None:
    refusal(wrong, BFLOAT16)


@pytest.mark.parametrize("name", ["mistral-window", "deepseek_v3"])
def test_rounding_is_no_reason(name: str) -> None:
    """In float32, tests/model/test_families.py checks them all."""
    assert checked(name, BFLOAT16) < 1


@pytest.mark.thorough
@pytest.mark.parametrize("name", MODELS)
def test_rounding_is_no_reason_in_any_of_several_models(name: str) -> None:
    assert max(checked(name, FLOAT32, seed) for seed in range(4)) < 0.2
    assert max(checked(name, BFLOAT16, seed) for seed in range(12)) < 1


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "gpt_oss"])
def test_long_positions(name: str) -> None:
    model = make_model(name, attention=PROBE, max_position_embeddings=131072)
    it = Engine(model, self_check=True, block_size=16, kv_cache_bytes=1 << 24).assembly.info.self_checked
    assert it is not None and it.last_position == 131071 and it.found < it.allowed / 4 and it.seconds < 10


@pytest.mark.parametrize("settings", [{"max_model_len": 3}, {"block_size": 1}, {"block_size": 24}, {"block_size": 64}])
def test_short_sequences_and_blocks_of_any_size(settings: dict[str, int]) -> None:
    assert checked("gemma2", FLOAT32, **settings) < 0.2


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_chunks_are_served(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No family of these has them, so one is given the other kind of mask."""
    family = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    monkeypatch.setattr(family, "create_causal_mask", create_chunked_causal_mask)
    model = make_model(name, attention=PROBE)
    model.config.attention_chunk_size = 37
    engine = Engine(model, self_check=True)
    it = engine.assembly.info.self_checked
    assert it is not None and it.found < it.allowed
    ignored = Wrong("chunks ignored", name, attention_sees(Visible()), {"attention_chunk_size": 37})
    refusal(ignored, FLOAT32)


def test_what_is_no_number_is_refused() -> None:
    model = make_model("llama", attention=PROBE)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight")[0, 0] = torch.nan
    with pytest.raises(UnsupportedModelError, match="not finite as Transformers computes them"):
        Engine(model, self_check=True)


def test_without_it_anything_is_served() -> None:
    with spoiled(WRONG[0].spoil):
        assert Engine(make_model(WRONG[0].model, attention=PROBE)).assembly.info.self_checked is None


def test_the_command_line_turns_it_off() -> None:
    parse = parser().parse_args
    assert config_of(parse(["serve", "."])).engine.self_check
    assert not config_of(parse(["serve", ".", "--no-self-check"])).engine.self_check


def test_too_few_kv_blocks_for_it_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(make_model("llama", attention=PROBE), self_check=True, kv_cache_bytes=1 << 14)
    assert engine.assembly.kv_cache.pool.num_blocks < 8
    assert engine.assembly.info.self_checked is None and "no self-check: it takes 8 KV blocks" in caplog.text


@pytest.mark.parametrize(("length", "block_size"), [(1, 4), (5, 4), (40, 16), (512, 4), (300, 24), (3000, 64)])
def test_counts_are_those_of_the_block_tables(length: int, block_size: int) -> None:
    """Each token sees what its sequence's table lists, the slots of the tokens that were stored there."""
    spread = Spread(length, block_size)
    counts = spread.counts(LayerMask(sliding_window_causal_mask_function(100), torch.device("cpu")))
    blocks = list(range(10, 10 + spread.num_blocks))
    slot_of = {run: [spread.table(run, blocks)[p // block_size] * block_size + p % block_size for p in range(run.end)]
               for run in spread.runs}  # fmt: skip
    stored = {slot_of[run][run.start + i]: row for run in spread.runs for i, row in enumerate(run.rows)}
    assert len(stored) == len(spread)  # each in a slot of its own
    for run in spread.runs:
        for row, position in zip(run.rows, range(run.start, run.end), strict=True):
            expected = torch.zeros(len(spread))
            for key in range(max(0, position - 99), position + 1):
                expected[stored[slot_of[run][key]]] += 1
            assert torch.equal(counts[row], expected)


def test_positions_reach_the_end_and_grow_evenly() -> None:
    positions = sorted(Spread(32768, 16).positions)
    assert positions[:8] == list(range(8)) and positions[-4:] == list(range(32764, 32768))
    assert all(later <= 2.5 * max(16, earlier) for earlier, later in zip(positions, positions[1:], strict=False))
    assert sum(positions) < 7 * 32768  # keys that are read, in each layer
