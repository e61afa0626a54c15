"""Latent attention: gains of kv_b_proj's rows on both sides of it, products in place, and which forwards are ours."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.adapter_rows import AdapterTiles, Segment
from kernels.latent_prep import Pairing
from kernels.lora import LoraSite, LoraWeights, SiteAdapters, lora
from server.model.latent_attention import form_of
from server.model.mla import AbsorbedProjection
from server.model.norms import RmsNorm
from tests.support.tiny_models import make_model

HEADS, LATENT, KEY, VALUE, RANK, TOKENS = 3, 8, 4, 5, 2, 6


@pytest.fixture
def projection() -> AbsorbedProjection:
    torch.manual_seed(0)
    linear = nn.Linear(LATENT, HEADS * (KEY + VALUE), bias=False)
    return AbsorbedProjection(SimpleNamespace(num_heads=HEADS, kv_lora_rank=LATENT, qk_nope_head_dim=KEY,
                                              v_head_dim=VALUE, kv_b_proj=linear))  # fmt: skip


def update(gain: torch.Tensor | None) -> LoraWeights:
    return LoraWeights(torch.randn(RANK, LATENT), torch.randn(HEADS * (KEY + VALUE), RANK), 0.5, gain)


@pytest.mark.parametrize("has_gain", [False, True])
def test_where_results_leave_rows_keep_their_gains(projection: AbsorbedProjection, has_gain: bool) -> None:
    gain = torch.rand(HEADS * (KEY + VALUE)) + 0.5 if has_gain else None
    weights, context = update(gain), torch.randn(TOKENS, HEADS, LATENT)
    site, held = LoraSite((VALUE,) * HEADS, own_inputs=True), SiteAdapters()
    held.by_slot[1] = [None] * HEADS
    for index, own in projection.split_for_values(weights):
        held.by_slot[1][index] = own
    with torch.no_grad():
        y = projection.values_out(context).contiguous()
        lora(y.flatten(1), context.flatten(1), site, held, AdapterTiles([Segment(0, TOKENS, 1)]), RANK)
        linear: nn.Linear = projection._attention.kv_b_proj
        merged = linear.weight + weights.scale * weights.b @ weights.a
        if gain is not None:
            merged = gain[:, None] * merged
        rows = merged.view(HEADS, KEY + VALUE, LATENT)[:, KEY:]
        torch.testing.assert_close(y, torch.einsum("thl,hvl->thv", context, rows))


@pytest.mark.parametrize("has_gain", [False, True])
def test_where_queries_enter_they_are_scaled_first(projection: AbsorbedProjection, has_gain: bool) -> None:
    """A gain scales rows of the projection, and a query goes through them the other way."""
    gain = torch.rand(HEADS * (KEY + VALUE)) + 0.5 if has_gain else None
    weights, query = update(gain), torch.randn(TOKENS, HEADS, KEY)
    scaled = query.clone()
    sites = (LoraSite((KEY,) * HEADS, own_inputs=True), LoraSite((LATENT,) * HEADS, own_inputs=True, transposed=True))
    held = tuple(SiteAdapters() for _ in sites)
    for its, split in zip(held, (projection.split_for_gains, projection.split_for_queries), strict=True):
        for index, own in split(weights):
            its.by_slot.setdefault(1, [None] * HEADS)[index] = own
    assert bool(held[0].by_slot) == has_gain  # without one there is nothing to do there
    tiles = AdapterTiles([Segment(0, TOKENS, 1)])
    with torch.no_grad():
        lora(scaled.flatten(1), scaled.flatten(1), sites[0], held[0], tiles, RANK)
        y = projection.queries_in(scaled).contiguous()
        lora(y.flatten(1), scaled.flatten(1), sites[1], held[1], tiles, RANK)
        merged = projection.rows() + weights.scale * weights.b @ weights.a
        if gain is not None:
            merged = gain[:, None] * merged
        keys = merged.view(HEADS, KEY + VALUE, LATENT)[:, :KEY]
        torch.testing.assert_close(y, torch.einsum("thk,hkl->thl", query, keys))


class Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_products_write_where_the_next_step_reads(projection: AbsorbedProjection) -> None:
    query, context = torch.randn(TOKENS, HEADS, KEY), torch.randn(TOKENS, HEADS, LATENT)
    wide, out = torch.zeros(TOKENS, HEADS, LATENT + 3), torch.zeros(TOKENS, HEADS, VALUE)
    with torch.no_grad():
        with Ops() as ops:
            projection.queries_into(query, wide[..., :LATENT])
            projection.values_into(context, out)
        assert [name for name in ops.names if "bmm" in name or "copy" in name or "clone" in name] == [
            "aten.bmm.out"
        ] * 2
        torch.testing.assert_close(wide[..., :LATENT], projection.queries_in(query))
        torch.testing.assert_close(out, projection.values_out(context))
    assert not wide[..., LATENT:].any()


@pytest.mark.parametrize(
    ("name", "pairing"),
    [("deepseek_v2", Pairing.ADJACENT), ("deepseek_v3", Pairing.INTERLEAVED), ("minicpm3", Pairing.HALVES),
     ("mistral4", None), ("deepseek_v32", None)],
)  # fmt: skip
def test_which_forwards_are_ours(name: str, pairing: Pairing | None) -> None:
    """Mistral 4's queries grow with their position, and DeepSeek-V3.2 asks its indexer."""
    attention: Any = make_model(name).get_submodule("model.layers.0.self_attn")
    attention.kv_a_layernorm = RmsNorm.in_place_of(attention.kv_a_layernorm)
    attention.expand_kv = lambda latent, rotated: (latent, rotated)
    form = form_of(attention)
    assert (form and form.pairing) == pairing
    assert form is None or form.scale == pytest.approx(attention.scaling)
