"""Triton form of sampling: one program a row, which reads the vocabulary as often as its parameters need and no more.

| row | passes over the vocabulary |
|---|---|
| greedy | 1 |
| temperature, min-p | 2, and the draw reads up to its token |
| top-k, top-p | 1, a search for each cut with a pass a step (cut/), and the draw |
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compiled.kernel import Configuration
from kernels.sampling.cut.kernel import ALL, Row, find_cut, keys_of, nth_at, weight_of
from kernels.sampling.reference import GREEDY_BELOW, Penalties, Sampled

BLOCK = 8192  # of the vocabulary, at a time
_WARPS = 16
_HISTORY_BLOCK = 64
_GREEDY_BELOW = tl.constexpr(GREEDY_BELOW)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _kept(row, ids, key, last_tie):
    """Weights of a block's tokens, 0 for those cut."""
    x = tl.load(row.logits + ids, mask=ids < row.V, other=float("-inf")).to(tl.float32)
    keys = keys_of(x)
    kept = (ids < row.V) & ((keys > key) | ((keys == key) & (ids <= last_tie)))
    return tl.where(kept, weight_of(x, row), 0.0)


@triton.jit
def _draw(row, key, last_tie, target, BLOCK: tl.constexpr):
    """The first id up to which the kept weights sum to more than the target."""
    lane = tl.arange(0, BLOCK)
    token = row.V
    for _ in range(2):
        before = 0.0
        start = 0
        while (start < row.V) & (token == row.V):
            weight = _kept(row, start + lane, key, last_tie)
            total = tl.sum(weight)
            if before + total > target:
                sums = tl.cumsum(weight, 0)
                token = tl.min(tl.where((weight > 0) & (before + sums > target), start + lane, row.V))
                if token == row.V:  # the two kinds of sum round apart: the last token that counts
                    token = tl.min(tl.where(sums >= tl.max(sums), start + lane, row.V))
            before += total
            start += BLOCK
        # rounding, or a draw of 1, placed the target at the end: just before the end, then
        target = before * (1.0 - 1e-6)
    return token


@triton.jit
def _largest(logits, V, BLOCK: tl.constexpr):
    """(largest logit, its lowest id, whether there is one and none is NaN or +inf)."""
    lane = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, V, BLOCK):
        x = tl.load(logits + start + lane, mask=start + lane < V, other=float("-inf")).to(tl.float32)
        x = tl.where(x < float("inf"), x, float("inf"))  # NaN too: whatever is broken is the largest
        better = x > best
        best = tl.where(better, x, best)
        where = tl.where(better, start + lane, where)
    largest = tl.max(best)
    token = tl.min(tl.where(best == largest, where, V))
    return largest, token, (largest > float("-inf")) & (largest < float("inf"))


class Outputs(NamedTuple):
    """What is written of each row; pointers in the kernel."""

    tokens: Any  # [R] int64
    finite: Any  # [R] bool


# parameters may be rows of one tensor, at any alignment; one compiled kernel serves all
@triton.jit(do_not_specialize_on_alignment=["temperature", "top_k", "top_p", "min_p", "draws"])
def _sample(
    logits,  # [R, V], rows `stride` apart
    stride,
    V,
    temperature,  # [R] float32, as top_p, min_p, draws
    top_k,  # [R] int32
    top_p,
    min_p,
    draws,
    out,  # Outputs
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0)
    mine = logits + r.to(tl.int64) * stride
    t = tl.load(temperature + r)
    largest, token, fine = _largest(mine, V, BLOCK)
    if fine & (t >= _GREEDY_BELOW):
        k, p = tl.load(top_k + r), tl.load(top_p + r)
        m = tl.minimum(tl.load(min_p + r), 1.0)
        row = Row(mine, V, largest, _LOG2_E / t, m)
        key, kept, total = find_cut(row, k, p, BLOCK)
        last_tie = V
        if kept < ALL:
            last_tie = nth_at(row, key, kept, BLOCK)
        target = tl.load(draws + r) * total  # loaded here: registers are scarce in the search
        token = _draw(row, key, last_tie, target, BLOCK)
    token = tl.where(fine, token, 0)
    tl.store(out.tokens + r, token.to(tl.int64))
    tl.store(out.finite + r, fine)


# histories and parameters come from anywhere in larger tensors; they are read number by number
@triton.jit(
    do_not_specialize_on_alignment=[
        "history", "history_starts", "prompt_lens", "presence", "frequency", "repetition",
    ]
)  # fmt: skip
def _penalize(
    logits,  # [R, V] float32, contiguous; changed in place
    history,  # [N] int32
    history_starts,  # [R + 1] int32
    prompt_lens,  # [R] int32
    presence,  # [R] float32, as the next two
    frequency,
    repetition,
    V,
    BLOCK: tl.constexpr,
):
    """A block of one row's history. Of equal tokens the first one acts, for all of them: no two write one logit."""
    r = tl.program_id(0)
    start = tl.load(history_starts + r)
    length = tl.load(history_starts + r + 1) - start
    first = tl.program_id(1) * BLOCK
    if first < length:
        i = first + tl.arange(0, BLOCK)
        token = tl.load(history + start + i, mask=i < length, other=-1)
        earlier = tl.zeros((BLOCK,), tl.int32)
        outputs = tl.zeros((BLOCK,), tl.int32)
        prompt_len = tl.load(prompt_lens + r)
        for other in range(0, length, BLOCK):
            j = other + tl.arange(0, BLOCK)
            same = tl.load(history + start + j, mask=j < length, other=-2)[None, :] == token[:, None]
            earlier += tl.sum((same & (j[None, :] < i[:, None])).to(tl.int32), 1)
            outputs += tl.sum((same & (j >= prompt_len)[None, :]).to(tl.int32), 1)
        acts = (token >= 0) & (token < V) & (earlier == 0)
        at = logits + r.to(tl.int64) * V + token
        x = tl.load(at, mask=acts, other=0.0)
        factor = tl.load(repetition + r)
        x = tl.where(x > 0, x / factor, x * factor)
        x -= tl.load(frequency + r) * outputs.to(tl.float32)
        x -= tl.where(outputs > 0, tl.load(presence + r), 0.0)
        tl.store(at, x, mask=acts)


@torch.library.custom_op("heddle::sample", mutates_args=())
def _sample_op(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    draws: Tensor,
    presence: Tensor | None,
    frequency: Tensor | None,
    repetition: Tensor | None,
    history: Tensor | None,
    history_starts: Tensor | None,
    prompt_lens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(tokens, finite); without penalties, all six None."""
    rows, vocab = logits.shape
    assert logits.stride(1) == 1 and top_k.dtype == torch.int32
    assert all(it.dtype == torch.float32 for it in (temperature, top_p, min_p, draws))
    outs = _outputs(logits)
    if not rows:
        return outs
    if history is not None and len(history):
        logits = torch.empty((rows, vocab), dtype=torch.float32, device=logits.device).copy_(logits)
        _penalize[(rows, triton.cdiv(len(history), _HISTORY_BLOCK))](
            logits, history, history_starts, prompt_lens, presence, frequency, repetition, vocab, BLOCK=_HISTORY_BLOCK
        )
    _sample[(rows,)](
        logits, logits.stride(0), vocab, temperature, top_k, top_p, min_p, draws, outs,
        BLOCK=BLOCK, num_warps=_WARPS,
    )  # fmt: skip
    return outs


def _outputs(logits: Tensor) -> Outputs:
    rows, device = logits.shape[0], logits.device
    return Outputs(
        torch.empty(rows, dtype=torch.int64, device=device), torch.empty(rows, dtype=torch.bool, device=device)
    )


@_sample_op.register_fake
def _(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _outputs(logits)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    draws: Tensor,
    penalties: Penalties | None = None,
) -> Sampled:
    """As in reference.py."""
    return Sampled(*_sample_op(logits, temperature, top_k, top_p, min_p, draws, *(penalties or (None,) * 6)))


def greedy(logits: Tensor) -> Sampled:
    """As in reference.py."""
    nought = torch.zeros(logits.shape[0], dtype=torch.float32, device=logits.device)
    return sample(logits, nought, nought.to(torch.int32), nought, nought, nought)


def configurations() -> Iterator[Configuration]:
    """Logits of both types; and penalties."""
    parameters = dict(temperature="*fp32", top_k="*i32", top_p="*fp32", min_p="*fp32", draws="*fp32")
    for element in ("bf16", "fp32"):
        types = dict(
            logits=f"*{element}:16", stride="i32:16", V="i32:16", **parameters, out=Outputs("*i64:16", "*u1:16")
        )
        yield Configuration(f"sample {element}", _sample, types, {"BLOCK": BLOCK}, _WARPS)
    types = {name: "*fp32" for name in ("presence", "frequency", "repetition")}
    types |= {name: "*i32" for name in ("history", "history_starts", "prompt_lens")}
    types |= {"logits": "*fp32:16", "V": "i32:16"}
    yield Configuration("penalize", _penalize, types, {"BLOCK": _HISTORY_BLOCK})
