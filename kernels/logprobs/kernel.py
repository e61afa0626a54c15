"""Triton form of logprobs: one pass over the vocabulary by several programs a row, and one that puts a row together.

Each part tells its largest logit, the sum of its exponentials relative to that, how many logits are larger than the
token's own, and its own most probable tokens, best first: with each other's, those hold the row's.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compiled.kernel import Configuration
from kernels.compiled.launch import launch
from kernels.logprobs.reference import LEAST, Logprobs
from kernels.sampling.cut.kernel import ALL, keys_of, logit_of

PART = 4096  # tokens of a program
_MERGED = 512  # of the parts' most probable, at a time: 32 parts' five, or 25 parts' twenty
_WARPS, _MERGE_WARPS = 8, 4
_LEAST = tl.constexpr(LEAST)
_NONE = tl.constexpr(-(2**63))  # the place of no token
_FIRST = tl.constexpr(2**63 - 1)


class Outputs(NamedTuple):
    """What is written of each row; pointers in the kernel."""

    chosen: Any  # [R] float32
    rank: Any  # [R] int64
    ids: Any  # [R, num] int64
    top: Any  # [R, num] float32


class Scratch(NamedTuple):
    """What parts tell; pointers in the kernel."""

    maxima: Any  # [R, parts] float32: +inf where anything is NaN
    weights: Any  # [R, parts] float32
    larger: Any  # [R, parts] int32
    places: Any  # [R, parts, num] int64, descending: (key, complement of id)


# how many are wanted differs from step to step: one compiled kernel serves any number
@triton.jit(do_not_specialize=["num"], do_not_specialize_on_alignment=["tokens"])
def _of_part(
    logits,  # [R, V], rows `stride` apart
    stride,
    V,
    tokens,  # [R] int64
    num,
    scratch,  # Scratch
    PART: tl.constexpr,
):
    r, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    mine = logits + r.to(tl.int64) * stride
    ids = part * PART + tl.arange(0, PART)
    x = tl.load(mine + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
    own = tl.load(mine + tl.load(tokens + r)).to(tl.float32)
    largest = tl.max(tl.where(x < float("inf"), x, float("inf")))
    at = r.to(tl.int64) * parts + part
    tl.store(scratch.maxima + at, largest)
    if largest < float("inf"):
        shift = tl.where(largest > float("-inf"), largest, 0.0)
        tl.store(scratch.weights + at, tl.sum(tl.exp(x - shift)))
        tl.store(scratch.larger + at, tl.sum((x > own).to(tl.int32)))
        places = (keys_of(x).to(tl.int64) << 32) | (ids ^ ALL).to(tl.int64)
        places = tl.where(ids < V, places, _NONE)
        for n in range(num):
            best = tl.max(places)
            tl.store(scratch.places + at * num + n, best)
            places = tl.where(places == best, _NONE, places)


@triton.jit(do_not_specialize=["parts", "num"])
def _merge(
    logits,
    stride,
    tokens,
    parts,
    num,
    scratch,
    out,  # Outputs
    PARTS: tl.constexpr,
    MERGED: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    at = r * parts + part
    maxima = tl.load(scratch.maxima + at, mask=part < parts, other=float("-inf"))
    largest = tl.max(maxima)
    ids = out.ids + r * num
    top = out.top + r * num
    if (largest > float("-inf")) & (largest < float("inf")):
        weights = tl.load(scratch.weights + at, mask=part < parts, other=0.0)
        larger = tl.load(scratch.larger + at, mask=part < parts, other=0)
        norm = largest + tl.log(tl.sum(weights * tl.exp(maxima - largest)))
        own = tl.load(logits + r * stride + tl.load(tokens + r)).to(tl.float32)
        tl.store(out.chosen + r, tl.maximum(own - norm, _LEAST))
        tl.store(out.rank + r, tl.sum(larger).to(tl.int64) + 1)
        lane = tl.arange(0, MERGED)
        previous = tl.full((), _FIRST, tl.int64)
        for n in range(num):
            best = tl.full((MERGED,), _NONE, tl.int64)
            for start in range(0, parts * num, MERGED):
                told = start + lane < parts * num
                places = tl.load(scratch.places + r * parts * num + start + lane, mask=told, other=_NONE)
                best = tl.maximum(best, tl.where(places < previous, places, _NONE))
            previous = tl.max(best)
            tl.store(ids + n, (previous & 0xFFFFFFFF) ^ ALL)
            tl.store(top + n, tl.maximum(logit_of((previous >> 32).to(tl.int32)) - norm, _LEAST))
    else:
        tl.store(out.chosen + r, float("nan"))
        tl.store(out.rank + r, tl.full((), 1, tl.int64))
        for n in range(num):
            tl.store(ids + n, tl.full((), 0, tl.int64))
            tl.store(top + n, float("nan"))


@launch("logprobs")
def _logprobs_op(logits: Tensor, tokens: Tensor, num: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert logits.stride(1) == 1 and tokens.dtype == torch.int64 and tokens.is_contiguous()
    outs = _outputs(logits, num)
    rows, vocab = logits.shape
    if rows:
        parts = triton.cdiv(vocab, PART)
        scratch = Scratch(
            torch.empty((rows, parts), dtype=torch.float32, device=logits.device),
            torch.empty((rows, parts), dtype=torch.float32, device=logits.device),
            torch.empty((rows, parts), dtype=torch.int32, device=logits.device),
            torch.empty((rows, parts, num), dtype=torch.int64, device=logits.device),
        )
        _of_part[(rows, parts)](logits, logits.stride(0), vocab, tokens, num, scratch, PART=PART, num_warps=_WARPS)
        _merge[(rows,)](
            logits, logits.stride(0), tokens, parts, num, scratch, outs, PARTS=triton.next_power_of_2(parts),
            MERGED=_MERGED, num_warps=_MERGE_WARPS,
        )  # fmt: skip
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
    scratch = Scratch("*fp32:16", "*fp32:16", "*i32:16", "*i64:16")
    outputs = Outputs("*fp32:16", "*i64:16", "*i64:16", "*fp32:16")
    for element in ("bf16", "fp32"):
        types = dict(logits=f"*{element}:16", stride="i32:16", V="i32:16", tokens="*i64", num="i32", parts="i32",
                     scratch=scratch, out=outputs)  # fmt: skip
        yield Configuration(f"part {element}", _of_part, types, {"PART": PART}, _WARPS)
        yield Configuration(f"merge {element}", _merge, types, {"PARTS": 32, "MERGED": _MERGED}, _MERGE_WARPS)
