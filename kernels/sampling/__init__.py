"""sampling: from logits to tokens, with penalties, cuts and draws.

For each row: penalties change the logits; a temperature of 0 takes the largest; otherwise the token is drawn from
softmax(logits / temperature), cut to the most likely tokens by top_k, min_p and top_p. reference.py has each step.

Running example, one row: logits [2, 1, 0, -1], temperature 1, top_k 3, top_p 0.8, no min_p, draw 0.8.

    softmax                [.644, .237, .087, .032]
    top_k keeps three      [.665, .245, .090]           summing to 1 again
    top_p keeps two        .665 is below .8, and .665 + .245 is not
    kept                   [.731, .269]
    the draw               .731 <= 0.8 < 1: token 1

Penalties read each row's history. Running example, two rows: row 0 has the prompt [5] and the output [9, 9], row 1 the
prompt [4] and no output yet.

    history         [5, 9, 9, 4]
    history_starts  [0, 3, 4]
    prompt_lens     [1, 1]
"""

from torch import Tensor

from kernels.compiled import takes
from kernels.sampling import reference
from kernels.sampling.reference import GREEDY_BELOW, Penalties, Sampled

__all__ = ["GREEDY_BELOW", "Penalties", "Sampled", "greedy", "sample"]


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    draws: Tensor,
    penalties: Penalties | None = None,
) -> Sampled:
    """One token a row. See reference.py for shapes."""
    if takes(logits):
        from kernels.sampling import kernel

        return kernel.sample(logits, temperature, top_k, top_p, min_p, draws, penalties)
    return reference.sample(logits, temperature, top_k, top_p, min_p, draws, penalties)


def greedy(logits: Tensor) -> Sampled:
    """The most likely token of each row of logits [R, V]: as `sample` with every temperature 0."""
    if takes(logits):
        from kernels.sampling import kernel

        return kernel.greedy(logits)
    return reference.greedy(logits)
