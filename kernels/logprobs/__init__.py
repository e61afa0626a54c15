"""logprobs: how probable a token was in its place, and which ones were the most probable there.

Of logits as the model has them: what sampling does to them (bias, penalties, temperature, cuts) is not in it.

Running example, one row: logits [2, 1, 2, -inf], the token 1, the two most probable ones wanted.

    softmax    [.422, .155, .422, 0]
    chosen     log .155 = -1.86
    rank       3: two logits are larger
    ids        [0, 2]: of equals the lower id first
    top        [-.862, -.862]

Token 3 would have -9999 (LEAST): nobody can write down the logarithm of nought.
"""

from torch import Tensor

from kernels.compiled import takes
from kernels.logprobs import reference
from kernels.logprobs.reference import LEAST, Logprobs

__all__ = ["LEAST", "Logprobs", "logprobs"]


def logprobs(logits: Tensor, tokens: Tensor, num: int) -> Logprobs:
    """Of one token a row. See reference.py for shapes."""
    if takes(logits):
        from kernels.logprobs import kernel

        return kernel.logprobs(logits, tokens, num)
    return reference.logprobs(logits, tokens, num)
