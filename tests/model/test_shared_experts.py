"""Shared experts as experts that are always chosen: which layers are such, and the layer out of their places."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from server.model.experts import experts_of
from server.model.shared_experts import FoundShared, PlacedDown, PlacedGateUp, fill, shared_experts_of
from tests.support.tiny_models import make_model

HIDDEN, INNER = 12, 5


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("deepseek_v2", FoundShared("shared_experts", 2)),
        ("glm4_moe", FoundShared("shared_experts", 1)),
        ("hunyuan_v1_moe", FoundShared("shared_mlp", 1)),
        ("qwen2_moe", None),  # weighted by a gate of its own
        ("laguna", None),  # of another width
    ],
)
def test_what_is_added_as_it_is_and_as_wide_as_some_experts(name: str, expected: FoundShared | None) -> None:
    model = make_model(name)
    found = [its for path, module in model.named_modules() if (its := experts_of(path, module)) is not None]
    block = model.get_submodule(found[0].spec.name.rpartition(".")[0])
    router = next(leaf for leaf, _ in block.named_children() if leaf in ("gate", "router"))
    assert shared_experts_of(block, router, "experts", found[0].spec.intermediate_size, found[0].activation) == expected


@pytest.mark.parametrize("num", [1, 2])
def test_places_are_the_layer(num: int) -> None:
    torch.manual_seed(num)
    layer = nn.Module()
    layer.gate_proj, layer.up_proj = (nn.Linear(HIDDEN, num * INNER, bias=False) for _ in range(2))
    layer.down_proj = nn.Linear(num * INNER, HIDDEN, bias=False)
    places = torch.empty(num, 2 * INNER, HIDDEN), torch.empty(num, HIDDEN, INNER)
    x, h = torch.randn(1, 3, HIDDEN), torch.randn(1, 3, num * INNER)
    with torch.inference_mode():
        fill(*places, layer)
        gate_up, down = PlacedGateUp(places[0]), PlacedDown(places[1])
        assert torch.equal(gate_up.rows(0), layer.gate_proj.weight)
        assert torch.equal(gate_up.rows(1), layer.up_proj.weight)
        assert torch.equal(down.rows(0), layer.down_proj.weight)
        expected = F.linear(x, torch.cat([layer.gate_proj.weight, layer.up_proj.weight]))
        torch.testing.assert_close(gate_up(x), expected)
        torch.testing.assert_close(down(h), layer.down_proj(h))
    assert (sum(gate_up.widths), gate_up.in_features) == (2 * num * INNER, HIDDEN)
    assert (down.widths, down.in_features) == ((HIDDEN,), num * INNER)
