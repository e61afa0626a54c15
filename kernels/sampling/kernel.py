"""Triton form of sampling: one program a row, which reads the vocabulary as often as its parameters need and no more.

| row | passes over the vocabulary |
|---|---|
| greedy | 1 |
| temperature, min-p | 2, and the draw reads up to its token |
| top-k, top-p | 1, a search for each cut with a pass a step, and the draw |

The cut is searched by bisection on int32 keys in the order of the float32 logits: each step counts, and weighs, what
lies at or above a key, and narrows the interval to keys that occur. So 32 steps at most, 16 for bfloat16 logits, no
sort, and exact for ties: the cut is a key and how many of the tokens at that key are kept, lowest ids first.

Sums are kept a lane apiece and reduced once a pass, which is more exact and cheaper than a reduction a block.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compiled.kernel import Configuration
from kernels.sampling.reference import GREEDY_BELOW, Logprobs, Penalties, Sampled

BLOCK = 8192  # of the vocabulary, at a time
_WARPS = 16
_HISTORY_BLOCK = 64
_GREEDY_BELOW = tl.constexpr(GREEDY_BELOW)
_NO_KEY = tl.constexpr(-(2**31))  # below the key of every float
_LOWEST_KEY = tl.constexpr(-2139095041)  # of -inf
_ALL = tl.constexpr(2**31 - 1)
_LOG2_E = tl.constexpr(1.4426950408889634)  # weights are exp2((x - largest) * scale), scale = log2(e) / temperature


@triton.jit
def _keys(x):
    """int32 in the order of float32 x, with -0.0 equal to 0.0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _logit(key):
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _weight(x, largest, scale, min_p):
    """Relative to the most likely token, 0 where min_p cuts."""
    weight = tl.exp2((x - largest) * scale)
    return tl.where(weight >= min_p, weight, 0.0)


@triton.jit
def _above(row, V, key, largest, scale, min_p, BLOCK: tl.constexpr):
    """Of the row's tokens at or above a key: (count, weight, lowest key); and the highest key below it."""
    lane = tl.arange(0, BLOCK)
    count = tl.zeros((BLOCK,), tl.int32)
    weight = tl.zeros((BLOCK,), tl.float32)
    lowest = tl.full((BLOCK,), _ALL, tl.int32)
    highest = tl.full((BLOCK,), _NO_KEY, tl.int32)
    for start in range(0, V, BLOCK):
        valid = start + lane < V
        x = tl.load(row + start + lane, mask=valid, other=float("-inf")).to(tl.float32)
        keys = tl.where(valid, _keys(x), _NO_KEY)
        high = keys >= key
        count += high.to(tl.int32)
        weight += tl.where(high, _weight(x, largest, scale, min_p), 0.0)
        lowest = tl.minimum(lowest, tl.where(high, keys, _ALL))
        highest = tl.maximum(highest, tl.where(high, _NO_KEY, keys))
    return tl.sum(count), tl.sum(weight), tl.min(lowest), tl.max(highest)


@triton.jit
def _search(row, V, low, low_count, low_weight, wanted, target, largest, scale, min_p, BLOCK: tl.constexpr):
    """The highest key at or above which there are `wanted` tokens that weigh `target`; `low` is known to be one.

    Returns (key, count and weight at or above it, count and weight above it). Where the count at it is just what is
    wanted the search ends, and what lies above is not known.
    """
    high = _keys(largest) + 1
    high_count = 0
    high_weight = 0.0
    while low + 1 < high:
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, which cannot overflow
        middle = tl.where(wanted == V, low, middle)  # everything is wanted: weigh it
        count, weight, lowest, highest = _above(row, V, middle, largest, scale, min_p, BLOCK)
        if (count >= wanted) & (weight >= target):
            low, low_count, low_weight = lowest, count, weight
            high = tl.where(count == wanted, low + 1, high)
        else:
            high, high_count, high_weight = highest + 1, count, weight
    return low, low_count, low_weight, high_count, high_weight


@triton.jit
def _nth_at(row, V, key, n, BLOCK: tl.constexpr):
    """The id of the n-th token (from 1) whose key this is."""
    lane = tl.arange(0, BLOCK)
    seen = 0
    start = 0
    found = V
    while start < V:
        valid = start + lane < V
        x = tl.load(row + start + lane, mask=valid, other=float("-inf")).to(tl.float32)
        here = (valid & (_keys(x) == key)).to(tl.int32)
        count = tl.sum(here)
        if seen + count >= n:
            found = tl.min(tl.where((here > 0) & (seen + tl.cumsum(here, 0) == n), start + lane, V))
            start = V
        else:
            seen += count
            start += BLOCK
    return found


@triton.jit
def _kept(row, ids, V, key, last_tie, largest, scale, min_p):
    """Weights of a block's tokens, 0 for those cut."""
    x = tl.load(row + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
    keys = _keys(x)
    kept = (ids < V) & ((keys > key) | ((keys == key) & (ids <= last_tie)))
    return tl.where(kept, _weight(x, largest, scale, min_p), 0.0)


@triton.jit
def _draw(row, V, key, last_tie, largest, scale, min_p, target, BLOCK: tl.constexpr):
    """The first id up to which the kept weights sum to more than the target."""
    lane = tl.arange(0, BLOCK)
    token = V
    for _ in range(2):
        before = 0.0
        start = 0
        while (start < V) & (token == V):
            weight = _kept(row, start + lane, V, key, last_tie, largest, scale, min_p)
            total = tl.sum(weight)
            if before + total > target:
                sums = tl.cumsum(weight, 0)
                token = tl.min(tl.where((weight > 0) & (before + sums > target), start + lane, V))
                if token == V:  # the two kinds of sum round apart: the last token that counts
                    token = tl.min(tl.where(sums >= tl.max(sums), start + lane, V))
            before += total
            start += BLOCK
        # rounding, or a draw of 1, placed the target at the end: just before the end, then
        target = before * (1.0 - 1e-6)
    return token


@triton.jit
def _largest(row, V, BLOCK: tl.constexpr):
    """(largest logit, its lowest id, whether there is one and none is NaN or +inf)."""
    lane = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, V, BLOCK):
        x = tl.load(row + start + lane, mask=start + lane < V, other=float("-inf")).to(tl.float32)
        x = tl.where(x < float("inf"), x, float("inf"))  # NaN too: whatever is broken is the largest
        better = x > best
        best = tl.where(better, x, best)
        where = tl.where(better, start + lane, where)
    largest = tl.max(best)
    token = tl.min(tl.where(best == largest, where, V))
    return largest, token, (largest > float("-inf")) & (largest < float("inf"))


@triton.jit
def _cut(row, V, largest, scale, top_k, top_p, min_p, BLOCK: tl.constexpr):
    """What is kept: (key, how many of the tokens at it, weight kept); and all above it, unless min_p cuts it.

    Two searches in one code: top-k by count (without it, one pass that weighs everything), and on what that left, top-p
    by weight.
    """
    key = tl.full((), _LOWEST_KEY, tl.int32)
    kept = tl.full((), _ALL, tl.int32)
    count = tl.where((top_k > 0) & (top_k < V), top_k, V)
    total = 0.0
    for by_weight in range(2):
        if (by_weight == 0) | (top_p < 1):
            wanted = tl.where(by_weight == 1, 0, count)
            target = tl.where(by_weight == 1, top_p * total, 0.0)
            before = tl.where(by_weight == 1, count, V)
            lowest = key
            key, found, weight, more, more_weight = _search(
                row, V, lowest, before, total, wanted, target, largest, scale, min_p, BLOCK
            )
            at = _weight(_logit(key), largest, scale, min_p)
            ties = (found - more).to(tl.float32)
            # the tie that reaches the target is still in
            up_to_target = tl.maximum(tl.ceil((target - more_weight) / tl.where(at > 0, at, 1.0)), 1.0)
            need = tl.where(by_weight == 1, up_to_target, (wanted - more).to(tl.float32))
            some = (found != wanted) & (need < ties)
            kept = tl.where(some, need.to(tl.int32), tl.where(key == lowest, kept, _ALL))
            total = tl.where(found == wanted, weight, more_weight + tl.minimum(need, ties) * at)
    return key, kept, total


@triton.jit
def _log_probabilities(row, V, largest, token, chosen, ids, top, NUM: tl.constexpr, BLOCK: tl.constexpr):
    """Of the token, and of the NUM most likely: each the best below the one before, by (key, complement of id)."""
    lane = tl.arange(0, BLOCK)
    weight = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(row + start + lane, mask=start + lane < V, other=float("-inf")).to(tl.float32)
        weight += tl.exp(x - largest)
    norm = largest + tl.log(tl.sum(weight))
    tl.store(chosen, tl.load(row + token).to(tl.float32) - norm)
    previous = tl.full((), 2**63 - 1, tl.int64)
    for n in range(NUM):
        best = tl.full((BLOCK,), -(2**63), tl.int64)
        for start in range(0, V, BLOCK):
            valid = start + lane < V
            x = tl.load(row + start + lane, mask=valid, other=float("-inf")).to(tl.float32)
            rank = (_keys(x).to(tl.int64) << 32) | ((start + lane) ^ _ALL).to(tl.int64)
            best = tl.maximum(best, tl.where(valid & (rank < previous), rank, -(2**63)))
        previous = tl.max(best)
        tl.store(ids + n, (previous & 0xFFFFFFFF) ^ _ALL)
        tl.store(top + n, _logit((previous >> 32).to(tl.int32)) - norm)


# parameters may be rows of one tensor, at any alignment; one compiled kernel serves all
@triton.jit(do_not_specialize_on_alignment=["temperature", "top_k", "top_p", "min_p", "draws"])
def _sample(
    logits,  # [R, V], rows `stride` apart
    temperature,  # [R] float32, as top_p, min_p, draws
    top_k,  # [R] int32
    top_p,
    min_p,
    draws,
    tokens,  # [R] int64
    finite,  # [R] bool
    chosen,  # [R] float32; unused without log-probabilities, as the next two
    ids,  # [R, NUM_LOGPROBS] int64
    top,  # [R, NUM_LOGPROBS] float32
    V,
    stride,
    NUM_LOGPROBS: tl.constexpr,  # -1: none, not even of the token
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0)
    row = logits + r.to(tl.int64) * stride
    t = tl.load(temperature + r)
    largest, token, fine = _largest(row, V, BLOCK)
    if fine & (t >= _GREEDY_BELOW):
        k, p = tl.load(top_k + r), tl.load(top_p + r)
        m = tl.minimum(tl.load(min_p + r), 1.0)
        scale = _LOG2_E / t
        key, kept, total = _cut(row, V, largest, scale, k, p, m, BLOCK)
        last_tie = V
        if kept < _ALL:
            last_tie = _nth_at(row, V, key, kept, BLOCK)
        target = tl.load(draws + r) * total  # loaded here: registers are scarce in the search
        token = _draw(row, V, key, last_tie, largest, scale, m, target, BLOCK)
    token = tl.where(fine, token, 0)
    tl.store(tokens + r, token.to(tl.int64))
    tl.store(finite + r, fine)
    if NUM_LOGPROBS >= 0:
        ids += r * NUM_LOGPROBS
        top += r * NUM_LOGPROBS
        if fine:
            _log_probabilities(row, V, largest, token, chosen + r, ids, top, NUM_LOGPROBS, BLOCK)
        else:
            tl.store(chosen + r, float("nan"))
            for n in range(NUM_LOGPROBS):
                tl.store(ids + n, 0)
                tl.store(top + n, float("nan"))


@triton.jit
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
    num_logprobs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(tokens, finite, logprob of the token, ids and logprobs of the most likely); without penalties, all six None."""
    rows, vocab = logits.shape
    assert logits.stride(1) == 1 and top_k.dtype == torch.int32 and num_logprobs <= vocab
    assert all(it.dtype == torch.float32 for it in (temperature, top_p, min_p, draws))
    outs = _outputs(logits, num_logprobs)
    if not rows:
        return outs
    if history is not None and len(history):
        logits = torch.empty((rows, vocab), dtype=torch.float32, device=logits.device).copy_(logits)
        _penalize[(rows, triton.cdiv(len(history), _HISTORY_BLOCK))](
            logits, history, history_starts, prompt_lens, presence, frequency, repetition, vocab, BLOCK=_HISTORY_BLOCK
        )
    _sample[(rows,)](
        logits, temperature, top_k, top_p, min_p, draws, *outs, vocab, logits.stride(0), NUM_LOGPROBS=num_logprobs,
        BLOCK=BLOCK, num_warps=_WARPS,
    )  # fmt: skip
    return outs


def _outputs(logits: Tensor, num_logprobs: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, device = logits.shape[0], logits.device
    width = max(num_logprobs, 0)
    return (
        torch.empty(rows, dtype=torch.int64, device=device),
        torch.empty(rows, dtype=torch.bool, device=device),
        torch.empty(rows if num_logprobs >= 0 else 0, dtype=torch.float32, device=device),
        torch.empty((rows, width), dtype=torch.int64, device=device),
        torch.empty((rows, width), dtype=torch.float32, device=device),
    )


@_sample_op.register_fake
def _(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _outputs(logits, rest[-1])


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
    """As kernels/sampling/reference.py. Up to 20 log-probabilities are worth it: each is a pass over the vocabulary."""
    count = -1 if num_logprobs is None else min(num_logprobs, logits.shape[1])
    tokens, finite, chosen, ids, top = _sample_op(
        logits, temperature, top_k, top_p, min_p, draws, *(penalties or (None,) * 6), count
    )
    return Sampled(tokens, finite, None if num_logprobs is None else Logprobs(chosen, ids, top))


def greedy(logits: Tensor) -> Sampled:
    """As `sample` with every temperature 0."""
    nought = torch.zeros(logits.shape[0], dtype=torch.float32, device=logits.device)
    return sample(logits, nought, nought.to(torch.int32), nought, nought, nought)


def configurations() -> Iterator[Configuration]:
    for dtype, num in (("bf16", -1), ("fp32", -1), ("bf16", 20), ("fp32", 20)):
        yield Configuration(
            name=f"sample {dtype}{f' logprobs {num}' if num >= 0 else ''}",
            kernel=_sample,
            types={name: "*fp32" for name in ("temperature", "top_p", "min_p", "draws", "chosen", "top")}
            | {"logits": f"*{dtype}", "top_k": "*i32", "tokens": "*i64", "finite": "*u1", "ids": "*i64"}
            | {"V": "i32", "stride": "i32"},
            constants={"NUM_LOGPROBS": num, "BLOCK": BLOCK},
            aligned=("logits", "V", "stride"),
            num_warps=_WARPS,
        )
    yield Configuration(
        name="penalize",
        kernel=_penalize,
        types={name: "*fp32" for name in ("logits", "presence", "frequency", "repetition")}
        | {name: "*i32" for name in ("history", "history_starts", "prompt_lens")}
        | {"V": "i32"},
        constants={"BLOCK": _HISTORY_BLOCK},
        aligned=("logits", "V"),
    )
