"""Triton form of edits: how a row of logits is read through its mask, and the copies of rows that have more than that.

A program makes a part of a copy. It spreads the row's lists out over the part, in the memory where the copy will be, so
lists of any length cost one reading, nothing has to be cleared, and the order of what is counted does not matter.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

_LIST = tl.constexpr(2048)  # of a list, at a time
_SEEN = tl.constexpr(1 << 30)  # beside how often a token was put out


class View(NamedTuple):
    """A row of logits as it is chosen from; pointers, and which of them counts."""

    logits: Any
    copy: Any  # float32
    mask: Any  # words of 32 bits
    is_copied: Any
    is_masked: Any


@triton.jit
def view_of(r, logits, stride, V, places, copies, mask_rows, masks, words, EDITED: tl.constexpr):
    mine = logits + r.to(tl.int64) * stride
    if EDITED:
        place = tl.load(places + r)
        mask_row = tl.load(mask_rows + r)
        copy = copies + tl.maximum(place, 0).to(tl.int64) * V
        mask = masks + tl.maximum(mask_row, 0).to(tl.int64) * words
        return View(mine, copy, mask, place >= 0, (place < 0) & (mask_row >= 0))
    else:
        return View(mine, mine, mine, False, False)


@triton.jit
def _forbidden(mask, ids, valid):
    """What is added to a token's logit."""
    words = tl.load(mask + (ids >> 5), mask=valid, other=0)
    return tl.where(((words >> (ids & 31)) & 1) == 1, 0.0, float("-inf"))


@triton.jit
def read(view, ids, valid, EDITED: tl.constexpr):
    """Logits as float32, -inf where not valid."""
    if EDITED:
        if view.is_copied:
            x = tl.load(view.copy + ids, mask=valid, other=float("-inf"))
        else:
            x = tl.load(view.logits + ids, mask=valid, other=float("-inf")).to(tl.float32)
            if view.is_masked:
                x += _forbidden(view.mask, ids, valid)
    else:
        x = tl.load(view.logits + ids, mask=valid, other=float("-inf")).to(tl.float32)
    return x


@triton.jit
def is_any_left(left, place, parts, PARTS: tl.constexpr):
    """Whether the row's bans leave anything to choose from."""
    part = tl.arange(0, PARTS)
    return tl.sum(tl.load(left + place * parts + part, mask=part < parts, other=0)) > 0


@triton.jit
def ban(copy, bans, starts, place, first, end):
    """Take the banned tokens in [first, end) out of a copy."""
    last = tl.load(starts + place + 1)
    for start in range(tl.load(starts + place), last, _LIST):
        i = start + tl.arange(0, _LIST)
        token = tl.load(bans + i, mask=i < last, other=-1)
        mine = (token >= first) & (token < end)
        x = tl.load(copy + token, mask=mine, other=0.0)
        tl.store(copy + token, x + float("-inf"), mask=mine)  # NaN stays NaN, and infinity becomes it
    tl.debug_barrier()  # what is read next is read by other threads


@triton.jit
def _bias(x, copy, ids, valid, tokens, biases, starts, place, first, end):
    start, last = tl.load(starts + place), tl.load(starts + place + 1)
    if start < last:
        tl.store(copy + ids, tl.zeros_like(x), mask=valid)
        tl.debug_barrier()
        for at in range(start, last, _LIST):
            i = at + tl.arange(0, _LIST)
            token = tl.load(tokens + i, mask=i < last, other=-1)
            mine = (token >= first) & (token < end)
            tl.store(copy + token, tl.load(biases + i, mask=mine, other=0.0), mask=mine)
        tl.debug_barrier()
        x += tl.load(copy + ids, mask=valid, other=0.0)
        tl.debug_barrier()
    return x


@triton.jit
def _penalised(x, counts, ids, valid, history, starts, place, first, end, prompt_len, presence, frequency, repetition):
    """counts: the copy's memory as int32."""
    start, last = tl.load(starts + place), tl.load(starts + place + 1)
    if start < last:
        tl.store(counts + ids, tl.zeros_like(ids), mask=valid)
        tl.debug_barrier()
        for at in range(start, last, _LIST):
            i = at + tl.arange(0, _LIST)
            token = tl.load(history + i, mask=i < last, other=-1)
            mine = (token >= first) & (token < end)
            tl.atomic_or(counts + token, _SEEN, mask=mine, sem="relaxed")
            tl.atomic_add(counts + token, 1, mask=mine & (i - start >= prompt_len), sem="relaxed")
        tl.debug_barrier()
        count = tl.load(counts + ids, mask=valid, other=0, cache_modifier=".cg")
        outputs = count & (_SEEN - 1)
        x = tl.where(count != 0, tl.where(x > 0, tl.div_rn(x, repetition), x * repetition), x)
        x -= frequency * outputs.to(tl.float32)
        x -= tl.where(outputs > 0, presence, 0.0)
        tl.debug_barrier()
    return x


# lists come from anywhere in larger tensors; they are read number by number
@triton.jit(
    do_not_specialize=["words"],
    do_not_specialize_on_alignment=[
        "places", "mask_rows", "masks", "bias_starts", "bias_tokens", "biases", "ban_starts", "bans",
        "history_starts", "history", "prompt_lens", "presence", "frequency", "repetition",
    ],
)  # fmt: skip
def copy_edited(
    logits,  # [R, V], rows `stride` apart
    stride,
    V,
    copies,  # [P, V] float32
    counts,  # the same memory, as int32
    left,  # [P, parts] int32: how many tokens bans leave
    masks,  # as Edits has them, from here on
    words,
    mask_rows,
    places,
    bias_starts,
    bias_tokens,
    biases,
    ban_starts,
    bans,
    history_starts,
    history,
    prompt_lens,
    presence,
    frequency,
    repetition,
    PART: tl.constexpr,
):
    """Programs: (row, part). All edits but the bans, of which it says what they would leave."""
    r = tl.program_id(0)
    part = tl.program_id(1)
    place = tl.load(places + r)
    if place >= 0:
        first = part * PART
        end = tl.minimum(first + PART, V)
        ids = first + tl.arange(0, PART)
        valid = ids < V
        copy = copies + place.to(tl.int64) * V
        x = tl.load(logits + r.to(tl.int64) * stride + ids, mask=valid, other=float("-inf")).to(tl.float32)
        x = _bias(x, copy, ids, valid, bias_tokens, biases, bias_starts, place, first, end)
        mask_row = tl.load(mask_rows + r)
        if mask_row >= 0:
            x += _forbidden(masks + mask_row.to(tl.int64) * words, ids, valid)
        x = _penalised(
            x, counts + place.to(tl.int64) * V, ids, valid, history, history_starts, place, first, end,
            tl.load(prompt_lens + place), tl.load(presence + place), tl.load(frequency + place),
            tl.load(repetition + place),
        )  # fmt: skip
        tl.store(copy + ids, x, mask=valid)
        num_left = tl.sum((valid & (x > float("-inf"))).to(tl.int32))
        start, last = tl.load(ban_starts + place), tl.load(ban_starts + place + 1)
        if start < last:
            tl.debug_barrier()
            for at in range(start, last, _LIST):
                i = at + tl.arange(0, _LIST)
                token = tl.load(bans + i, mask=i < last, other=-1)
                mine = (token >= first) & (token < end)
                num_left -= tl.sum((tl.load(copy + token, mask=mine, other=float("-inf")) > float("-inf")).to(tl.int32))
        tl.store(left + place * tl.num_programs(1) + part, num_left)
