"""Before the first request: compile every kernel that it could meet, and capture its graphs.

A compilation in the serving loop is a stall of seconds for everybody. What cannot run here fails at start, with its
reason, instead of ending the engine later.
"""

import torch
from torch import Tensor

from kernels.adapter_rows import ShapeKey
from server.engine.request import LaneSpec, Request, Sampling
from server.model.cuda_graphs import GraphedForward
from server.model.device_inputs import padding_step
from server.model.forward import KernelForward
from server.model.inputs import integers
from server.model.loader import OnProgress
from server.model.logprobs import LogprobRows
from server.model.sampler import Sampler

# tokens: one of each tile size of attention and experts, and the most there can be
PREFILLS = (2, 17, 65, 129, 257, 1 << 30)


@torch.inference_mode()
def warm_up(forward: GraphedForward, block_size: int, on_progress: OnProgress) -> None:
    """Prefills and decodes with and without adapters, and one sampling of each kind. Raises CaptureError."""
    capacity = forward.eager.inputs.capacity
    longest = min(capacity.tokens, capacity.blocks * block_size)
    prefills = sorted({min(tokens, longest) for tokens in PREFILLS}, reverse=True)
    captures, largest = forward.keys(), forward.shapes[-1]
    # prefills with LoRA always: an adapter of a rank above all that is captured may come
    shapes = {shape._replace(rank=max(1, largest.rank)) for shape in forward.shapes}
    if largest.experts:
        shapes.add(ShapeKey(max(1, largest.rank), largest.experts, max(1, largest.expert_rank)))
    total = len(prefills) * len(shapes) + len(captures)
    done = 0
    for tokens in prefills:
        for shape in shapes:
            _prefill(forward.eager, tokens, block_size, shape)
            done += 1
            on_progress("Compiling kernels", done, total)
    for key in captures:
        forward.capture(key)
        done += 1
        on_progress("Capturing graphs", done, total)
    longest_one = forward.eager.compute(padding_step(block_size, prefills[0]))  # without adapters latents are expanded
    _sample_each_kind(longest_one.logits)


KINDS = (
    Sampling(top_p=0.9, top_k=50), Sampling(), Sampling(temperature=0.0), Sampling(repetition=1.1, presence=0.5),
    Sampling(num_logprobs=1), Sampling(bias={0: 1.0}),
)  # fmt: skip


def _sample_each_kind(logits: Tensor) -> None:
    """logits [1, V]. Where V is odd, rows of a larger tensor lie at addresses that kernels are compiled anew for, and
    what is edited is of another type than what the model gives."""
    for kind in KINDS:
        sampler = Sampler([Request(0, [LaneSpec([0])], 1, kind)])
        sampler.sample(logits, sampler.draws(integers([1])))[1].read()
    rows = logits.expand(2, -1).contiguous()
    for some in (rows, rows[1:]):
        LogprobRows(some, torch.zeros(len(some), dtype=torch.int64, device=some.device), [1] * len(some)).read()


def _prefill(eager: KernelForward, tokens: int, block_size: int, shape: ShapeKey) -> Tensor:
    """At every site, at none of which an adapter has a row."""
    return eager.model(eager.inputs.fill(padding_step(block_size, tokens), shape, at_all_sites=True))
