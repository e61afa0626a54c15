"""What verification says of whatever lies there: the adapter, or a refusal in few words; never anything else."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters_store import verify as worker
from adapters_store.errors import MAX_MESSAGE_BYTES, InvalidAdapter
from adapters_store.verify import Job
from tests.support.adapter_files import NESTED_CONFIG, esft, lora

# matching this against a module's name takes for ever, and has a limit of its own; so many of them take minutes
SLOW = "(.|..|...)+(.|..|...)+(?<=!)"


def test_one_slow_match_is_refused_by_its_pattern(tmp_path: Path, job: Callable[[str], Job]) -> None:
    lora(tmp_path / "a", rank_pattern={"q_proj": 2, "up_proj": 2, SLOW: 2})
    lora(tmp_path / "b", alpha_pattern={SLOW: 2})
    with pytest.raises(InvalidAdapter, match="pattern number 1 of alpha_pattern"):
        worker.verify(job("b"))
    assert worker.verify(job("a"))  # never tried: others match first


@pytest.mark.parametrize("error", [MemoryError(), RecursionError(), ValueError("[/x]\x1b[2J" * 900), KeyError("a")])
def test_whatever_goes_wrong_is_a_refusal(
    tmp_path: Path, job: Callable[[str], Job], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    lora(tmp_path / "a")
    monkeypatch.setattr(worker, "read_adapter", fail)
    answer = worker.answer(job("a"))
    assert isinstance(answer, worker.Refused) and answer.kind == "InvalidAdapter"
    assert type(error).__name__ in answer.message and len(answer.message) < 200
    assert "Traceback" in answer.details and len(answer.details) <= 8000 and "\x1b" not in answer.details


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("adapter_config.json", NESTED_CONFIG),
        ("adapter_config.json", NESTED_CONFIG.replace("rank_pattern", "unknown")),
        ("adapter_config.json", NESTED_CONFIG.replace("rank_pattern", "target_modules")),
        ("adapter_config.json", '{"peft_type": "LORA", "r": 1' + "0" * 4200 + ', "lora_alpha": 1}'),
        ("adapter_config.json", '{"peft_type": "LORA", "r": 1, "lora_alpha": 1e999}'),
        ("expert_cfg.json", '{"experts": {"' + "1" * 4500 + '": [0]}}'),
        ("expert_cfg.json", '{"experts": {"1": [' + "1" * 4200 + "]}}"),
    ],
)
def test_hostile_configurations_are_refused_in_few_words(
    tmp_path: Path, job: Callable[[str], Job], file: str, text: str
) -> None:
    directory = lora(tmp_path / "a") if file == "adapter_config.json" else esft(tmp_path / "a", {1: [0]})
    (directory / file).write_text(text)
    answer = worker.answer(job("a"))
    assert isinstance(answer, worker.Refused) and answer.details == "", answer
    assert len(answer.message.encode()) <= MAX_MESSAGE_BYTES


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


_PEFT_KEYS = ["r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "target_parameters",
              "init_lora_weights", "peft_type", "task_type", "bias", "base_model_name_or_path", "other"]  # fmt: skip


_ESFT_KEYS = ["experts", "shared_experts", "non_expert_modules", "other"]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    peft=st.dictionaries(st.sampled_from(_PEFT_KEYS), _JSON, max_size=3),
    esft_config=st.dictionaries(st.sampled_from(_ESFT_KEYS), _JSON, max_size=3),
    index=st.dictionaries(st.sampled_from(["metadata", "weight_map", "other"]), _JSON, max_size=3),
)
def test_no_configuration_is_unforeseen(
    tmp_path: Path, job: Callable[[str], Job], peft: Any, esft_config: Any, index: Any
) -> None:
    lora(tmp_path / "a", **peft)
    esft(tmp_path / "b", {1: [0]}, **esft_config)
    (esft(tmp_path / "c", {1: [0]}) / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in ("a", "b", "c"):
        answer = worker.answer(job(path))
        assert isinstance(answer, worker.Verified) or answer.details == "", answer.details


def test_an_index_over_a_mebibyte_costs_nothing(tmp_path: Path, job: Callable[[str], Job]) -> None:
    directory = esft(tmp_path / "a", {1: [0]})
    index = {"weight_map": {f"k{number}": "x" for number in range(100_000)}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    start = time.process_time()
    with pytest.raises(InvalidAdapter, match="at most 1,048,576 are read"):
        worker.verify(job("a"))
    assert time.process_time() - start < 0.5
