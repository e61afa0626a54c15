"""Gains of kv_b_proj's rows on both sides of absorbed attention."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kernels.adapter_rows import AdapterTiles, Segment
from kernels.lora import LoraSite, LoraWeights, SiteAdapters, lora
from server.model.mla import AbsorbedProjection

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
