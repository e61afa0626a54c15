"""Before the first request: compile every kernel that it could meet, and capture its graphs.

A compilation in the serving loop is a stall of seconds for everybody. What cannot run here fails at start, with its
reason, instead of ending the engine later.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.lora import LoraSite
from server.model.cuda_graphs import GraphedForward
from server.model.device_inputs import padding_step
from server.model.loader import OnProgress
from server.model.sampler import sample

PREFILLS = (2, 17, 65, 1 << 30)  # tokens: one of each tile size of attention and experts, and the most there can be


@dataclass(frozen=True)
class _Sampling:
    temperature: float = 1.0
    top_p: float = 0.9
    top_k: int = 50
    seed: int = 0


@torch.inference_mode()
def warm_up(
    forward: GraphedForward, sites: Sequence[LoraSite], has_experts: bool, block_size: int, on_progress: OnProgress
) -> None:
    """Prefills and decodes with and without adapters, and one sampling of each kind.

    The largest decode is captured first: the others fit into its memory. Graphs with LoRA wait until an adapter is
    used, since they depend on the places where it acts.
    """
    capacity = forward.eager.inputs.capacity
    longest = min(capacity.tokens, capacity.blocks * block_size)
    prefills = sorted({min(tokens, longest) for tokens in PREFILLS}, reverse=True)
    kinds = [False, True] if has_experts else [False]
    captures = [(rows, with_experts) for with_experts in kinds for rows in reversed(forward.sizes)]
    total = len(prefills) * len(kinds) + len(captures)
    done = 0
    for tokens in prefills:
        for with_experts in kinds:
            _prefill(forward, tokens, block_size, sites, with_experts)
            done += 1
            on_progress("Compiling kernels", done, total)
    for rows, with_experts in captures:
        forward.captured(rows, False, with_experts)
        done += 1
        on_progress("Capturing graphs", done, total)
    logits = forward.logits(padding_step())
    for sampling in (_Sampling(), _Sampling(top_p=1.0, top_k=0), _Sampling(temperature=0.0)):
        sample(logits, [sampling], [0])


def _prefill(
    forward: GraphedForward, tokens: int, block_size: int, sites: Sequence[LoraSite], with_experts: bool
) -> Tensor:
    """With every site of LoRA, at none of which an adapter has a row."""
    used = [site.is_used for site in sites]
    for site in sites:
        site.is_used = True
    try:
        eager = forward.eager
        inputs = eager.inputs.fill(padding_step(tokens, block_size), tokens, 64, True, with_experts)
        return eager.model(inputs)
    finally:
        for site, was_used in zip(sites, used, strict=True):
            site.is_used = was_used
