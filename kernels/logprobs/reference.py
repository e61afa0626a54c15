"""Reference and CPU path of logprobs.

No sort of a vocabulary: the best are looked for with topk, and only where equal logits lie on both sides of its cut are
that row's equals told apart by id. Rows are taken in blocks, so that what is held beside the logits stays bounded.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LEAST = -9999.0  # the least that is said of a logarithm: that of nought cannot be written as JSON. vLLM says the same
_BLOCK = 1 << 22  # logits at a time: 16 MiB in float32


class Logprobs(NamedTuple):
    """Natural logarithms of probabilities, by row.

    chosen [R] float32: of the row's token. rank [R] int64: 1 + the number of tokens that are more probable. ids
    [R, num] int64 and top [R, num] float32: the most probable tokens and theirs, best first, of equals the lowest id
    first. In a row that is not finite (NaN, +inf, or nothing above -inf) logarithms are NaN, the rank 1 and ids 0.
    """

    chosen: Tensor
    rank: Tensor
    ids: Tensor
    top: Tensor


def logprobs(logits: Tensor, tokens: Tensor, num: int) -> Logprobs:
    """logits [R, V], float32, bfloat16 or float16, rows contiguous; tokens [R] int64. num: as many of the most probable
    tokens, or V of them if that is less; 0 is none."""
    rows, vocab = logits.shape
    num = min(num, vocab)
    out = Logprobs(
        torch.empty(rows, dtype=torch.float32, device=logits.device),
        torch.empty(rows, dtype=torch.int64, device=logits.device),
        torch.empty((rows, num), dtype=torch.int64, device=logits.device),
        torch.empty((rows, num), dtype=torch.float32, device=logits.device),
    )
    block = max(1, _BLOCK // vocab)
    for start in range(0, rows, block):
        these = slice(start, start + block)
        for whole, part in zip(out, _of_block(logits[these].float(), tokens[these], num), strict=True):
            whole[these] = part
    return out


def _of_block(logits: Tensor, tokens: Tensor, num: int) -> Logprobs:
    norm = logits.logsumexp(-1, keepdim=True)
    finite = norm.isfinite()
    own = logits.gather(-1, tokens[:, None])
    rank = torch.where(finite[:, 0], (logits > own).sum(-1) + 1, 1)
    ids = _best(logits, finite, num)
    both = torch.cat([own, logits.gather(-1, ids)], -1).sub_(norm).clamp_(min=LEAST).masked_fill_(~finite, float("nan"))
    return Logprobs(both[:, 0], rank, ids.masked_fill(~finite, 0), both[:, 1:])


def _best(logits: Tensor, finite: Tensor, num: int) -> Tensor:
    """The ids [R, num] of the largest, of equals the lowest first."""
    if num == 0:
        return torch.empty((len(logits), 0), dtype=torch.int64, device=logits.device)
    vocab = logits.shape[-1]
    values, ids = logits.topk(min(num + 1, vocab))
    if num < vocab:
        crossed = ((values[:, num - 1] == values[:, num]) & finite[:, 0]).nonzero()[:, 0]
        ids = ids[:, :num].contiguous()
        if len(crossed):  # topk takes any of the equals
            ids[crossed] = _lowest(logits[crossed], values[crossed, :num])
    ids = ids.sort().values
    order = logits.gather(-1, ids).sort(dim=-1, descending=True, stable=True).indices
    return ids.gather(-1, order)


def _lowest(logits: Tensor, best: Tensor) -> Tensor:
    """The ids [R, n], ascending, of the n tokens whose logits are `best` [R, n], descending."""
    least = best[:, -1:]
    equal = logits == least
    wanted = (best == least).sum(-1, keepdim=True)
    taken = (logits > least) | (equal & (equal.cumsum(-1) <= wanted))
    return taken.nonzero()[:, 1].view(best.shape)
