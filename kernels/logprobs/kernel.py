"""Triton form of logprobs: one program a row. Two passes over the vocabulary, and one for each of the most probable."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compiled.kernel import Configuration
from kernels.logprobs.reference import LEAST, Logprobs
from kernels.sampling.cut.kernel import ALL, keys_of, logit_of

BLOCK = 8192  # of the vocabulary, at a time
_WARPS = 16
_LEAST = tl.constexpr(LEAST)


class Outputs(NamedTuple):
    """What is written of each row; pointers in the kernel."""

    chosen: Any  # [R] float32
    rank: Any  # [R] int64
    ids: Any  # [R, num] int64
    top: Any  # [R, num] float32


@triton.jit
def _largest(logits, V, BLOCK: tl.constexpr):
    """+inf if any is NaN."""
    lane = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(logits + start + lane, mask=start + lane < V, other=float("-inf")).to(tl.float32)
        best = tl.maximum(best, tl.where(x < float("inf"), x, float("inf")))
    return tl.max(best)


@triton.jit
def _norm_and_rank(logits, V, largest, own, BLOCK: tl.constexpr):
    """(the logarithm of the sum of exponentials, 1 + how many logits are larger than the token's own)."""
    lane = tl.arange(0, BLOCK)
    weight = tl.zeros((BLOCK,), tl.float32)
    larger = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, V, BLOCK):
        x = tl.load(logits + start + lane, mask=start + lane < V, other=float("-inf")).to(tl.float32)
        weight += tl.exp(x - largest)
        larger += (x > own).to(tl.int32)
    return largest + tl.log(tl.sum(weight)), tl.sum(larger) + 1


# how many are wanted differs from step to step: one compiled kernel serves any number
@triton.jit(do_not_specialize=["num"], do_not_specialize_on_alignment=["tokens"])
def _logprobs(
    logits,  # [R, V], rows `stride` apart
    stride,
    V,
    tokens,  # [R] int64
    num,
    out,  # Outputs
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0)
    mine = logits + r.to(tl.int64) * stride
    ids = out.ids + r.to(tl.int64) * num
    top = out.top + r.to(tl.int64) * num
    largest = _largest(mine, V, BLOCK)
    if (largest > float("-inf")) & (largest < float("inf")):
        own = tl.load(mine + tl.load(tokens + r)).to(tl.float32)
        norm, rank = _norm_and_rank(mine, V, largest, own, BLOCK)
        tl.store(out.chosen + r, tl.maximum(own - norm, _LEAST))
        tl.store(out.rank + r, rank.to(tl.int64))
        lane = tl.arange(0, BLOCK)
        # each is the best below the one before, by (key, complement of id)
        previous = tl.full((), 2**63 - 1, tl.int64)
        for n in range(num):
            best = tl.full((BLOCK,), -(2**63), tl.int64)
            for start in range(0, V, BLOCK):
                valid = start + lane < V
                x = tl.load(mine + start + lane, mask=valid, other=float("-inf")).to(tl.float32)
                place = (keys_of(x).to(tl.int64) << 32) | ((start + lane) ^ ALL).to(tl.int64)
                best = tl.maximum(best, tl.where(valid & (place < previous), place, -(2**63)))
            previous = tl.max(best)
            tl.store(ids + n, (previous & 0xFFFFFFFF) ^ ALL)
            tl.store(top + n, tl.maximum(logit_of((previous >> 32).to(tl.int32)) - norm, _LEAST))
    else:
        tl.store(out.chosen + r, float("nan"))
        tl.store(out.rank + r, tl.full((), 1, tl.int64))
        for n in range(num):
            tl.store(ids + n, tl.full((), 0, tl.int64))
            tl.store(top + n, float("nan"))


@torch.library.custom_op("heddle::logprobs", mutates_args=())
def _logprobs_op(logits: Tensor, tokens: Tensor, num: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert logits.stride(1) == 1 and tokens.dtype == torch.int64 and tokens.is_contiguous()
    outs = _outputs(logits, num)
    if logits.shape[0]:
        _logprobs[(logits.shape[0],)](
            logits, logits.stride(0), logits.shape[1], tokens, num, outs, BLOCK=BLOCK, num_warps=_WARPS
        )
    return outs


def _outputs(logits: Tensor, num: int) -> Outputs:
    rows, device = logits.shape[0], logits.device
    return Outputs(
        torch.empty(rows, dtype=torch.float32, device=device),
        torch.empty(rows, dtype=torch.int64, device=device),
        torch.empty((rows, num), dtype=torch.int64, device=device),
        torch.empty((rows, num), dtype=torch.float32, device=device),
    )


@_logprobs_op.register_fake
def _(logits: Tensor, tokens: Tensor, num: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _outputs(logits, num)


def logprobs(logits: Tensor, tokens: Tensor, num: int) -> Logprobs:
    """As in reference.py."""
    return Logprobs(*_logprobs_op(logits, tokens, min(num, logits.shape[1])))


def configurations() -> Iterator[Configuration]:
    """Logits of both types."""
    outputs = Outputs("*fp32:16", "*i64:16", "*i64:16", "*fp32:16")
    for element in ("bf16", "fp32"):
        types = dict(logits=f"*{element}:16", stride="i32:16", V="i32:16", tokens="*i64", num="i32", out=outputs)
        yield Configuration(f"logprobs {element}", _logprobs, types, {"BLOCK": BLOCK}, _WARPS)
