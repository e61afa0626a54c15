"""Reference and CPU path of expert_route: ExpertWeave's batched rerouting (arXiv 2508.17624, section 4.3)."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Buckets:
    """(token, choice) pairs sorted by expert slot.

    Running example, 2 tokens with 2 choices each, pairs numbered token * 2 + choice:
        slots of the pairs  [7, 3, 3, 0]
        pairs   [3, 1, 2, 0]      the pairs in order of slot
        slots   [0, 3, 7]         slots in use, ascending
        counts  [1, 2, 1]         pairs of each
    """

    pairs: Tensor
    slots: list[int]
    counts: list[int]


def expert_route(expert_ids: Tensor, token_slots: Tensor | None, expert_map: Tensor) -> Buckets:
    """Replace each chosen expert by the slot that its token's adapter has for it, and sort by slot.

    expert_ids [T, K] int64: the router's choice among the base's M experts; weights are untouched by rerouting.
    token_slots [T] int64: adapter slot of each token, 0 for the base; None if no token has an expert adapter.
    expert_map [adapters + 1, M] int64: row 0 is the identity.
    """
    if token_slots is not None:
        expert_ids = expert_map[token_slots[:, None], expert_ids]
    flat = expert_ids.flatten()
    pairs = flat.argsort(stable=True)
    slots, counts = torch.unique_consecutive(flat[pairs], return_counts=True)
    return Buckets(pairs, slots.tolist(), counts.tolist())
