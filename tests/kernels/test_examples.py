"""The running examples in the docstrings of kernels/ say what references and host kernels compute."""

import pytest
import torch
from torch import Tensor

from kernels.adapter_rows import Segment, cut
from kernels.expert_route import Routed, Routing, TokenBatch, expert_route
from kernels.expert_tiles import expert_tiles
from kernels.grouped_gemm import combine
from kernels.logprobs import logprobs
from kernels.lora import LoraSite, LoraWeights, SiteAdapters, lora
from kernels.paged_attention import AttentionBatch, paged_attention
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rope, rope_complex
from kernels.sampling import Parameters, sample
from kernels.store_kv import store_kv
from tests.support.device_batch import device_batch
from tests.support.lora_tables import attach, tiles_of

pytestmark = pytest.mark.usefixtures("implementation")


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_lora() -> None:
    site, tiles = LoraSite((2, 1)), tiles_of([0, 2, 2], 16)
    assert (
        tiles.spans == [Segment(1, 3, 2)]
        and cut(tiles.spans, 16) == [(2, 1, 2)]
        and tiles.tiles.tolist() == [[2, 1, 2]]
    )
    x = torch.tensor([[1.0, 0.0], [1.0, 1.0], [2.0, 1.0]])
    weights = LoraWeights(torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [0.0]]), 2.0)
    for gain, row in ((None, [9, 5, 5]), (torch.tensor([2.0, 1.0]), [18, 5, 5])):
        y = torch.full((3, 3), 5.0)
        held = SiteAdapters({2: [weights._replace(gain=gain), None]})
        attach(site, held, 3, "cpu")
        assert held.offsets.tolist() == [0, 2, 3]
        lora(y, x, site, held, tiles, 1)
        assert y[1].tolist() == row and y[0].tolist() == [5, 5, 5]


def routed() -> Routed:
    logits = torch.tensor([[0.01, 0.6, 0.01, 0.4], [0.3, 0.01, 0.01, 0.7]]).log()
    expert_map = torch.stack([ints(0, 1, 2, 3), ints(0, 7, 2, 3)])
    return expert_route(logits, Routing(2, renormalise=True), expert_map, 8, TokenBatch(ints(1, 0)), 1)


def test_expert_route() -> None:
    got = routed()
    torch.testing.assert_close(got.weights, torch.tensor([[0.6, 0.4], [0.7, 0.3]]))
    assert got.places.tolist() == [[7, 3], [3, 0]] and got.pairs.tolist() == [3, 1, 2, 0]
    assert got.tiles.tolist() == [[0, 0, 1], [3, 1, 1], [3, 2, 1], [7, 3, 1]] and got.num_tiles.tolist() == [4]


def test_expert_tiles() -> None:
    chosen = torch.tensor([[2, 1], [1, 2], [1, 2], [0, 1]])  # by each token, the best first
    logits = torch.zeros(4, 4).scatter_(1, chosen, torch.tensor([2.0, 1.0]).expand(4, 2))
    expert_map, slots = torch.stack([ints(0, 1, 2, 3), ints(0, 1, 2, 3), ints(5, 1, 2, 3)]), ints(0, 1, 1, 2)
    routed = expert_route(logits, Routing(2), expert_map, 6, TokenBatch(slots), 4)
    assert routed.pairs.tolist() == [1, 2, 4, 7, 0, 3, 5, 6]
    assert routed.tiles.tolist() == [[1, 0, 4], [2, 4, 3], [5, 7, 1]]
    cut = expert_tiles(routed, slots, 4)
    assert sorted(cut.tiles.tolist()) == [[5, 1, 2], [6, 5, 2], [9, 3, 1]] and cut.num_tiles.tolist() == [3]


def test_grouped_gemm() -> None:
    rows = torch.randn(4, 3)
    wanted = torch.stack([0.6 * rows[0] + 0.4 * rows[1], 0.7 * rows[2] + 0.3 * rows[3]])
    torch.testing.assert_close(combine(rows, routed()), wanted)


def test_paged_attention_and_store_kv(implementation: str) -> None:
    """Each key that a row sees has a value of its own, and all the same score."""
    tables, slots = [[9, 2], [4, 7]], ints(9, 18, 19, 28)
    earlier = ints(36, 37, 38, 39, 8, 16, 17)
    key_cache, value_cache = torch.zeros(10, 4, 1, 2), torch.zeros(10, 4, 1, 40)
    store_kv(torch.ones(7, 1, 2), torch.eye(40)[earlier.long(), None], key_cache, value_cache, earlier)
    store_kv(torch.ones(4, 1, 2), torch.eye(40)[slots.long(), None], key_cache, value_cache, slots)
    lengths = [1, 3], [6, 5], tables
    batch = device_batch(*lengths, "cpu") if implementation == "host" else AttentionBatch(*lengths, 4, torch.float32)
    out = paged_attention(torch.ones(4, 1, 2), key_cache, value_cache, batch, 1.0)
    seen = [row.nonzero().flatten().tolist() for row in out[:, 0]]
    assert [set(it) for it in seen] == [{36, 37, 38, 39, 8, 9}, {16, 17, 18}, {16, 17, 18, 19}, {16, 17, 18, 19, 28}]


def test_rms_norm() -> None:
    weight = torch.tensor([1.0, 2.0])
    normed = rms_norm(torch.tensor([[3.0, 4.0]]), weight, 0.0)
    torch.testing.assert_close(normed, torch.tensor([[0.849, 2.263]]), atol=1e-3, rtol=0)
    got, total = add_rms_norm(torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 1.0]]), weight, 0.0)
    assert torch.equal(got, normed) and total.tolist() == [[3, 4]]


def test_rope() -> None:
    head = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    cos, sin = torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[1.0, 0.0]]])
    assert rope(head, head, cos, sin)[0].flatten().tolist() == [-3, 2, 1, 4]
    assert rope(head, head, cos, sin, interleaved=True)[0].flatten().tolist() == [-2, 3, 1, 4]
    assert rope_complex(head, head, torch.stack([cos, sin], -1))[0].flatten().tolist() == [-2, 1, 3, 4]


def test_sampling() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    for draw, token in ((0.0, 0), (0.73, 0), (0.74, 1), (0.8, 1), (1.0, 1)):
        asked = Parameters(torch.ones(1), ints(3), torch.tensor([0.8]), torch.zeros(1), torch.tensor([draw]))
        assert sample(logits, asked).tokens.tolist() == [token]


def test_logprobs() -> None:
    logits = torch.tensor([[2.0, 1.0, 2.0, -torch.inf]])
    got = logprobs(logits, torch.tensor([1]), 2)
    assert round(got.chosen.item(), 2) == -1.86 and got.rank.tolist() == [3]
    assert got.ids.tolist() == [[0, 2]] and [round(it, 3) for it in got.top[0].tolist()] == [-0.862, -0.862]
    assert logprobs(logits, torch.tensor([3]), 0).chosen.tolist() == [-9999]
