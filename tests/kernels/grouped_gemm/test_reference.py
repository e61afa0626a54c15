"""Routed experts by references and by host kernels against the obvious computation, with unwritten memory poisoned."""

import math
import random

import pytest
import torch

from kernels.expert_route import Routing, TokenBatch, expert_route
from kernels.grouped_gemm import Activation, Layout, combine, down, gate_up
from tests.support.popularity import POPULARITIES, pick

pytestmark = pytest.mark.usefixtures("poisoned_memory", "implementation")

ATOL = 2e-4  # float32 sums of up to a few hundred products of order 1, twice one after another
ONE_TILE = 1 << 30


@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize(("tokens", "width", "inner"), [(1, 8, 12), (7, 5, 9), (64, 16, 8)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_experts(popularity: str, tokens: int, width: int, inner: int, transposed: bool, bias: bool) -> None:
    experts, choices, places = 6, 3, 40
    rng = random.Random(2)
    expert_map = torch.arange(experts, dtype=torch.int32).repeat(4, 1)
    expert_map[1, [0, 4]] = torch.tensor([6, 7], dtype=torch.int32)
    expert_map[3, 2] = 33
    logits = torch.randn(tokens, experts)
    adapters = torch.tensor(pick(popularity, tokens, 4, rng))
    ups, downs = torch.randn(places, 2 * inner, width), torch.randn(places, width, inner)
    ids = logits.topk(choices).indices
    used = torch.unique(expert_map[adapters[:, None], ids])
    unused = [place for place in range(places) if place not in used]
    ups[unused] = downs[unused] = math.nan  # nobody may read an unused place
    up_bias, down_bias = (torch.randn(places, 2 * inner), torch.randn(places, width)) if bias else (None, None)
    hidden = torch.randn(tokens, width)
    layout = Layout(transposed)
    stored = [stack.transpose(1, 2).contiguous() if transposed else stack for stack in (ups, downs)]
    routed = expert_route(
        logits, Routing(choices, renormalise=True), expert_map, places, TokenBatch(adapters), ONE_TILE
    )
    gated = gate_up(hidden, stored[0], routed, Activation(), layout, up_bias)
    got = combine(down(gated, stored[1], routed, layout, down_bias), routed)
    weights = logits.softmax(-1).gather(1, ids)
    weights /= weights.sum(-1, keepdim=True)
    for token in range(tokens):
        expected = torch.zeros(width)
        for choice in range(choices):
            place = expert_map[adapters[token], ids[token, choice]]
            gate, up = (ups[place] @ hidden[token] + (0 if up_bias is None else up_bias[place])).chunk(2)
            product = downs[place] @ (torch.nn.functional.silu(gate) * up)
            expected += weights[token, choice] * (product + (0 if down_bias is None else down_bias[place]))
        torch.testing.assert_close(got[token], expected, atol=ATOL, rtol=1e-5)
