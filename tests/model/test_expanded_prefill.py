"""Prompts over latents with their keys and values expanded: the same numbers, and only where that is less work."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kernels.adapter_rows import AdapterRows, AdapterTiles, ShapeKey
from kernels.compiled import everywhere
from kernels.latent_prep import LatentNorm, Pairing, Turns
from server.model import expanded_prefill
from server.model.expanded_prefill import HostSequences, LatentSizes, is_less_expanded
from server.model.inputs import CurrentStep, StepInputs
from server.model.masks import Visible
from server.model.mla import AbsorbedProjection, LatentLayer
from server.model.probe import KVShape
from tests.support.device_batch import device_batch
from tests.support.kernel_device import DEVICE

SIZES = LatentSizes(heads=2, latent=16, rotary=4, key=8, value=6)
V2_LITE = LatentSizes(heads=16, latent=512, rotary=64, key=128, value=128)
BLOCK_SIZE = 4


@pytest.mark.slow
@pytest.mark.parametrize("query_lens", [[3, 1, 6], [5, 2]], ids=["beside a decode", "alone"])
def test_what_is_expanded_is_the_same(query_lens: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expanded_prefill, "LEAST_TOKENS", 2)
    monkeypatch.setattr(expanded_prefill, "MARGIN", 0.0)
    kv_lens, tables = [9, 6, 6][: len(query_lens)], [[7, 2, 5], [1, 3], [0, 6]][: len(query_lens)]
    it, tokens, step = SIZES, sum(query_lens), CurrentStep()
    linear = nn.Linear(it.latent, it.heads * (it.key + it.value), bias=False, device=DEVICE)
    layer = LatentLayer(
        AbsorbedProjection(SimpleNamespace(num_heads=it.heads, kv_lora_rank=it.latent, qk_nope_head_dim=it.key,
                                           v_head_dim=it.value, kv_b_proj=linear)),
        KVShape(1, it.latent + it.rotary, 0), Visible(), step,
    )  # fmt: skip
    cache = torch.randn(8, BLOCK_SIZE, 1, it.latent + it.rotary, device=DEVICE)
    layer.allocate(lambda *_: cache)
    angles = torch.randn(tokens, it.rotary, device=DEVICE)
    places = [
        table[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE
        for new, keys, table in zip(query_lens, kv_lens, tables, strict=True)
        for at in range(keys - new, keys)
    ]
    absorbed = StepInputs(
        torch.zeros(tokens, device=DEVICE), torch.zeros(tokens, device=DEVICE), torch.tensor(places, device=DEVICE),
        None, device_batch(query_lens, kv_lens, tables, DEVICE), torch.zeros(0),
        AdapterRows(None, AdapterTiles([]), AdapterTiles([]), ShapeKey()),
    )  # fmt: skip
    sequences = HostSequences(query_lens, kv_lens, tables)
    arguments = (
        torch.randn(tokens, it.heads, it.key + it.rotary, device=DEVICE),
        torch.randn(tokens, it.latent + it.rotary, device=DEVICE),
        LatentNorm(torch.ones(it.latent, device=DEVICE), 1e-6), Turns(angles.cos(), angles.sin(), Pairing.HALVES), 0.3,
    )  # fmt: skip
    outputs = []
    with everywhere(), torch.no_grad():
        for inputs in (absorbed, replace(absorbed, sequences=sequences)):
            with step.of(inputs):
                outputs.append(layer.attend_in_place(*arguments))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    plan = sequences.expanded(it, absorbed.attention, BLOCK_SIZE, 4)  # type: ignore[arg-type]
    assert plan is not None and (plan.absorbed is None) == (1 not in query_lens)


def test_only_what_is_less_work_is_expanded() -> None:
    assert not is_less_expanded(1, 30_000, V2_LITE) and not is_less_expanded(64, 64, V2_LITE)
    assert is_less_expanded(512, 512, V2_LITE) and is_less_expanded(512, 30_000, V2_LITE)
    assert not is_less_expanded(100, 30_000, V2_LITE)


def test_what_is_expanded_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """In whole blocks: the first prompt that fits, and no second one."""
    monkeypatch.setattr(expanded_prefill, "MOST_BYTES", 2 * 16 * (2 * 128 + 64 + 128) * 1008)
    sequences = HostSequences([2000, 1000, 1000], [2000, 1000, 1000], [list(range(125)) for _ in range(3)])
    plan = sequences.expanded(V2_LITE, device_batch([2000, 1000, 1000], [2000, 1000, 1000], [[0]] * 3, "cpu"), 16, 2)
    assert plan is not None and plan.expanded.batch.kv_lens.tolist() == [1000]
    assert plan.expanded.rows.tolist() == list(range(2000, 3000)) and len(plan.blocks) == 63
    assert plan.absorbed is not None and plan.absorbed.batch.query_starts.tolist() == [0, 2000, 3000]
