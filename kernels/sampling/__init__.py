"""sampling: from logits to tokens, with penalties, cuts, draws and log-probabilities."""

from torch import Tensor

from kernels.compiled import takes
from kernels.sampling import reference
from kernels.sampling.reference import GREEDY_BELOW, Logprobs, Penalties, Sampled

__all__ = ["GREEDY_BELOW", "Logprobs", "Penalties", "Sampled", "greedy", "sample"]


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    draws: Tensor,
    penalties: Penalties | None = None,
    num_logprobs: int | None = None,
) -> Sampled:
    """See kernels/sampling/reference.py."""
    if takes(logits):
        from kernels.sampling import kernel

        return kernel.sample(logits, temperature, top_k, top_p, min_p, draws, penalties, num_logprobs)
    return reference.sample(logits, temperature, top_k, top_p, min_p, draws, penalties, num_logprobs)


def greedy(logits: Tensor) -> Sampled:
    """The likeliest token of each row; as `sample` with every temperature 0."""
    if takes(logits):
        from kernels.sampling import kernel

        return kernel.greedy(logits)
    return reference.greedy(logits)
