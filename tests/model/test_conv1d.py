"""GPT-2's linears are stored the other way round: adapters act on them as on any other's."""

from pathlib import Path

import pytest
from transformers.pytorch_utils import Conv1D

from server.model.conv1d import straighten
from tests.support.peft_merged import assert_served_as_merged, save_peft
from tests.support.tiny_models import make_model, reference


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_of_peft_are_served_as_merged(dora: bool, tmp_path: Path) -> None:
    targets = ["c_attn", "c_proj", "c_fc"]
    merged = save_peft(tmp_path / "it", "gpt2", target_modules=targets, fan_in_fan_out=True, use_dora=dora)
    assert_served_as_merged("gpt2", tmp_path / "it", merged)


def test_the_model_stays_what_it_was() -> None:
    model, prompt = make_model("gpt2"), [5, 77, 3, 120, 9]
    before = reference(model, prompt)
    straighten(model)
    assert not any(isinstance(module, Conv1D) for module in model.modules())
    assert reference(model, prompt) == before
