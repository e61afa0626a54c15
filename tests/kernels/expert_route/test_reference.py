"""expert_route's reference and its host kernel against the paper's example, with unwritten memory poisoned."""

import pytest
import torch
from torch import Tensor

from kernels.expert_route import Routing, TokenBatch, expert_route

pytestmark = pytest.mark.usefixtures("poisoned_memory", "implementation")

ONE_TILE = 1 << 30


def logits_for(chosen: Tensor, experts: int) -> Tensor:
    """Logits by which each token chooses these experts, the first of them first."""
    logits = torch.zeros(len(chosen), experts)
    logits.scatter_(1, chosen, torch.arange(chosen.shape[1], 0, -1).float().expand_as(chosen))
    return logits


def test_expert_route_on_the_papers_example() -> None:
    """ExpertWeave (arXiv 2508.17624), figure 4: M = 64, E_max = 8, adapters that tune 3 and 7 experts."""
    tuned = {1: [3, 14, 47], 2: [5, 13, 14, 27, 35, 57, 59]}
    expert_map = torch.arange(64, dtype=torch.int32).repeat(3, 1)
    for adapter, experts in tuned.items():
        expert_map[adapter, experts] = 64 + (adapter - 1) * 8 + torch.arange(len(experts), dtype=torch.int32)
    chosen = torch.tensor([[15, 14, 45, 47, 3, 57], [31, 13, 62, 12, 34, 14], [26, 47, 31, 3, 58, 60],
                           [13, 31, 14, 35, 15, 5], [8, 27, 35, 59, 5, 63], [57, 5, 3, 13, 27, 59]])  # fmt: skip
    adapters = torch.tensor([0, 1, 1, 2, 2, 2])
    expected = [[15, 14, 45, 47, 3, 57], [31, 13, 62, 12, 34, 65], [26, 66, 31, 64, 58, 60],
                [73, 31, 74, 76, 15, 72], [8, 75, 76, 78, 72, 63], [77, 72, 3, 73, 75, 78]]  # fmt: skip
    routed = expert_route(logits_for(chosen, 64), Routing(6), expert_map, 80, TokenBatch(adapters), ONE_TILE)
    assert routed.places.tolist() == expected
    flat = routed.places.flatten()
    assert flat[routed.pairs.long()].tolist() == sorted(flat.tolist())
    assert routed.tiles[:, 0].tolist() == sorted(set(flat.tolist())) and int(routed.tiles[:, 2].sum()) == 36


def test_base_only_batches_are_not_rerouted() -> None:
    logits = logits_for(torch.tensor([[2, 0], [1, 2]]), 3)
    routed = expert_route(logits, Routing(2), torch.full((1, 3), 99), 3, TokenBatch(None), ONE_TILE)
    assert routed.tiles[:, 0].tolist() == [0, 1, 2]
