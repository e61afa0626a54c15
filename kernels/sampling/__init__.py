"""sampling: from logits to tokens, with edits, cuts and draws.

For each row: edits change the logits (edits/); a temperature of 0 takes the largest; otherwise the token is drawn from
softmax(logits / temperature), cut to the most likely tokens by top_k, min_p and top_p. reference.py has each step.

Running example, one row: logits [2, 1, 0, -1], temperature 1, top_k 3, top_p 0.8, no min_p, draw 0.8.

    softmax                [.644, .237, .087, .032]
    top_k keeps three      [.665, .245, .090]           summing to 1 again
    top_p keeps two        .665 is below .8, and .665 + .245 is not
    kept                   [.731, .269]
    the draw               .731 <= 0.8 < 1: token 1

The model's logits are read, never written.
"""

from torch import Tensor

from kernels.compiled import takes
from kernels.sampling import reference
from kernels.sampling.edits.reference import Edits
from kernels.sampling.reference import GREEDY_BELOW, Parameters, Sampled

__all__ = ["GREEDY_BELOW", "Edits", "Parameters", "Sampled", "greedy", "sample"]


def sample(logits: Tensor, parameters: Parameters, edits: Edits | None = None, out: Sampled | None = None) -> Sampled:
    """One token a row, into `out` if it is given. See reference.py for shapes."""
    if takes(logits):
        from kernels.sampling import kernel

        return kernel.sample(logits, parameters, edits, out)
    return reference.sample(logits, parameters, edits, out)


def greedy(logits: Tensor, out: Sampled | None = None) -> Sampled:
    """The most likely token of each row of logits [R, V]: as `sample` with every temperature 0."""
    if takes(logits):
        from kernels.sampling import kernel

        return kernel.greedy(logits, out)
    return reference.greedy(logits, out)
