"""Triton form of sampling: several programs a row, three launches that meet in memory and nowhere else.

    scan     (row, part)   the largest logit of each part, and counts by bin where something is cut (bins/)
    gather   (row, part)   weights, and the tokens among which the cut lies
    choose   (row)         greedily; or the exact cut among those, and the draw within one part

| row | passes over the vocabulary |
|---|---|
| greedy | 1 |
| temperature, min-p | 2, and the draw's part |
| top-k, top-p | 2, and the draw's part |
| the same where bins cannot tell | 2, and a search by one program, a pass a step (cut/) |
| any of these with bias, bans or penalties | 1 more, which copies the row |

Bins cannot tell where more logits than a part has are nearly equal, and where top-k cuts 32 below the largest.
Nothing depends on what runs when: sums have a fixed order, and there are no counters.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compiled.kernel import Configuration, registers
from kernels.compiled.launch import launch
from kernels.sampling.bins.kernel import Cuts, bin_of, count_before, count_bins, find_range, is_cut, per_unit
from kernels.sampling.cut.kernel import ALL, LOWEST_KEY, Scale, weight_of
from kernels.sampling.draw.kernel import NUM_SUMS, Scratch, cut_row, draw_token
from kernels.sampling.edits.kernel import ban, copy_edited, is_any_left, read, view_of
from kernels.sampling.edits.reference import Edits
from kernels.sampling.reference import GREEDY_BELOW, Parameters, Sampled

PART = 8192  # tokens of a program, and the most that the cut is looked for among
_GATHERED, _SEARCHED = 1024, 2048  # of those, at a time
_BINS = 512
_WARPS, _GATHER_WARPS = 16, 8
_MOST_REGISTERS = 128  # where the assembler would rather spill a little
_GREEDY_BELOW = tl.constexpr(GREEDY_BELOW)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _cuts(r, top_k, top_p, min_p, V):
    k = tl.load(top_k + r)
    return Cuts(tl.where((k > 0) & (k < V), k, ALL), tl.load(top_p + r), tl.minimum(tl.load(min_p + r), 1.0))


@triton.jit
def _largest(maxima, best, parts, PARTS: tl.constexpr):
    """(largest logit, its lowest id, whether there is one and none is NaN or +inf)."""
    part = tl.arange(0, PARTS)
    largest = tl.load(maxima + part, mask=part < parts, other=float("-inf"))
    most = tl.max(largest)
    ids = tl.load(best + part, mask=part < parts, other=2**31 - 1)
    token = tl.min(tl.where(largest == most, ids, 2**31 - 1))
    return most, token, (most > float("-inf")) & (most < float("inf"))


@triton.jit(
    do_not_specialize=["words"],
    do_not_specialize_on_alignment=[
        "temperature", "top_k", "top_p", "min_p", "places", "mask_rows", "masks", "bans", "ban_starts",
    ],
)  # fmt: skip
def _scan(
    logits,  # [R, V], rows `stride` apart
    stride,
    V,
    temperature,  # [R] float32, as top_p and min_p
    top_k,  # [R] int32
    top_p,
    min_p,
    scratch,  # Scratch
    copies,  # [P, V] float32
    masks,  # as in Edits, and the next ones
    words,
    mask_rows,
    places,
    left,  # [P, parts] int32
    bans,
    ban_starts,
    SAMPLED: tl.constexpr,
    EDITED: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    BINS: tl.constexpr,
):
    r, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    view = view_of(r, logits, stride, V, places, copies, mask_rows, masks, words, EDITED)
    first = part * PART
    if EDITED:
        if view.is_copied:
            place = tl.load(places + r)
            if is_any_left(left, place, parts, PARTS):
                ban(view.copy, bans, ban_starts, place, first, tl.minimum(first + PART, V))
    ids = first + tl.arange(0, PART)
    x = read(view, ids, ids < V, EDITED)
    known = tl.where(x < float("inf"), x, float("inf"))  # NaN too: whatever is broken is the largest
    largest = tl.max(known)
    tl.store(scratch.maxima + r * parts + part, largest)
    tl.store(scratch.best + r * parts + part, tl.min(tl.where(known == largest, ids, 2**31 - 1)))
    if SAMPLED:
        t = tl.load(temperature + r)
        is_drawn = (t >= _GREEDY_BELOW) & (largest > float("-inf")) & (largest < float("inf"))
        if is_drawn & is_cut(_cuts(r, top_k, top_p, min_p, V)):
            counts = scratch.counts + (r.to(tl.int64) * parts + part) * BINS
            count_bins(x, ids < V, largest, per_unit(t), counts, BINS)


@triton.jit(
    do_not_specialize=["words"],
    do_not_specialize_on_alignment=["temperature", "top_k", "top_p", "min_p", "places", "mask_rows", "masks"],
)
def _gather(
    logits, stride, V, temperature, top_k, top_p, min_p, scratch, copies, masks, words, mask_rows, places,
    EDITED: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr,
    LOST: tl.constexpr,
):  # fmt: skip
    """LOST: of float32's 23 bits of mantissa, those that the model's numbers do not have."""
    r, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    t = tl.load(temperature + r)
    maxima = scratch.maxima + r * parts
    largest, _, fine = _largest(maxima, scratch.best + r * parts, parts, PARTS)
    if fine & (t >= _GREEDY_BELOW):
        cuts = _cuts(r, top_k, top_p, min_p, V)
        scale = Scale(largest, _LOG2_E / t, cuts.min_p)
        density = per_unit(t)
        # a range beyond all bins: everything is above it
        first = tl.full((), ALL, tl.int32)
        last = first
        before = 0
        if is_cut(cuts):
            counts = scratch.counts + r.to(tl.int64) * parts * BINS
            taken = find_range(counts, maxima, parts, largest, scale.scale, density, cuts, BINS, PART, LOST)
            if part == 0:
                tl.store(scratch.found + r * 2, taken.count)
                tl.store(scratch.found + r * 2 + 1, taken.above)
            if taken.count > 0:
                first, last = taken.first, taken.last
                before = count_before(counts, maxima, part, largest, density, taken, BINS)
        view = view_of(r, logits, stride, V, places, copies, mask_rows, masks, words, EDITED)
        top = bin_of(largest, density)
        start = r.to(tl.int64) * PART + before
        above = tl.zeros((BLOCK,), tl.float32)
        within = tl.zeros((BLOCK,), tl.float32)
        below = tl.zeros((BLOCK,), tl.float32)
        for at in range(part * PART, tl.minimum(part * PART + PART, V), BLOCK):
            ids = at + tl.arange(0, BLOCK)
            x = read(view, ids, ids < V, EDITED)
            weight = weight_of(x, scale)
            bins = top - bin_of(x, density)
            is_within = (ids < V) & (bins >= first) & (bins <= last)
            above += tl.where(bins < first, weight, 0.0)
            within += tl.where(is_within, weight, 0.0)
            below += tl.where(bins > last, weight, 0.0)
            count = tl.sum(is_within.to(tl.int32))
            if count > 0:
                place = tl.cumsum(is_within.to(tl.int32), 0) - 1
                tl.store(scratch.some + start + place, x, mask=is_within)
                tl.store(scratch.ids + start + place, ids, mask=is_within)
                start += count
        sums = scratch.sums + r * NUM_SUMS * parts + part
        tl.store(sums, tl.sum(above))
        tl.store(sums + parts, tl.sum(within))
        tl.store(sums + 2 * parts, tl.sum(below))


# parameters may be rows of one tensor, at any alignment; one compiled kernel serves all
@triton.jit(
    do_not_specialize=["words"],
    do_not_specialize_on_alignment=[
        "temperature", "top_k", "top_p", "min_p", "draws", "places", "mask_rows", "masks", "tokens", "finite",
    ],
)  # fmt: skip
def _choose(
    logits, stride, V, temperature, top_k, top_p, min_p, draws, scratch, copies, masks, words, mask_rows, places,
    tokens,  # [R] int64
    finite,  # [R] bool
    SAMPLED: tl.constexpr, EDITED: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0)
    parts = tl.cdiv(V, PART)
    largest, token, fine = _largest(scratch.maxima + r * parts, scratch.best + r * parts, parts, PARTS)
    if SAMPLED:
        t = tl.load(temperature + r)
        if fine & (t >= _GREEDY_BELOW):
            cuts = _cuts(r, top_k, top_p, min_p, V)
            scale = Scale(largest, _LOG2_E / t, cuts.min_p)
            view = view_of(r, logits, stride, V, places, copies, mask_rows, masks, words, EDITED)
            part = tl.arange(0, PARTS)
            key = tl.full((), LOWEST_KEY, tl.int32)
            last_tie = V
            if is_cut(cuts):
                key, last_tie, weights = cut_row(r, view, V, parts, scale, cuts, scratch, EDITED, PARTS, PART, BLOCK)
            else:
                weights = tl.load(scratch.sums + r * NUM_SUMS * parts + part, mask=part < parts, other=0.0)
            token = draw_token(view, V, scale, key, last_tie, weights, tl.load(draws + r), EDITED, PARTS, PART, BLOCK)
    tl.store(tokens + r, tl.where(fine, token, 0).to(tl.int64))
    tl.store(finite + r, fine)


@launch("sample", mutates_args=["tokens", "finite"])
def _sample_op(
    logits: Tensor, parameters: Sequence[Tensor], edits: Sequence[Tensor], tokens: Tensor, finite: Tensor
) -> None:
    """parameters, edits: those of Parameters and Edits, or none. tokens, finite: as in Sampled, written."""
    rows, vocab = logits.shape
    assert logits.stride(1) == 1 and tokens.dtype == torch.int64 and finite.dtype == torch.bool
    if not rows:
        return
    parts = triton.cdiv(vocab, PART)
    scratch = _scratch(rows, parts, logits.device, is_sampled=bool(parameters))
    # what no kernel looks at has the type of what it would
    floats, ints = scratch.maxima, scratch.best
    *cuts, draws = parameters or (floats, ints, floats, floats, floats)
    assert [it.dtype for it in (*cuts, draws)] == [torch.float32, torch.int32, *[torch.float32] * 3]
    view, bans = _view(logits, Edits(*edits), parts) if edits else ((floats, ints, 0, ints, ints), (ints, ints, ints))
    row = (logits, logits.stride(0), vocab)
    kinds: dict[str, Any] = dict(EDITED=bool(edits), PARTS=triton.next_power_of_2(parts), PART=PART)
    is_sampled, most = bool(parameters), registers(_MOST_REGISTERS)
    _scan[(rows, parts)](
        *row, *cuts, scratch, *view, *bans, SAMPLED=is_sampled, BINS=_BINS, num_warps=_WARPS, **kinds
    )  # fmt: skip
    if is_sampled:
        _gather[(rows, parts)](
            *row, *cuts, scratch, *view, BLOCK=_GATHERED, BINS=_BINS, LOST=_lost_bits(logits.dtype),
            num_warps=_GATHER_WARPS, **kinds, **most,
        )  # fmt: skip
    _choose[(rows,)](
        *row, *cuts, draws, scratch, *view, tokens, finite, SAMPLED=is_sampled, BLOCK=_SEARCHED, num_warps=_WARPS,
        **kinds, **most,
    )  # fmt: skip


@_sample_op.register_fake
def _(*_: object) -> None: ...


def _view(logits: Tensor, edits: Edits, parts: int) -> tuple[tuple[Tensor, Tensor, int, Tensor, Tensor], list[Tensor]]:
    """What rows are read through, from `copies` on, and what their bans are, from `left` on. Makes the copies."""
    copies, left = _copied(logits, edits, parts)
    masks = (edits.masks, edits.masks.shape[1], edits.mask_rows, edits.places)
    return (copies.view(torch.float32), *masks), [left, edits.bans, edits.ban_starts]


def _copied(logits: Tensor, edits: Edits, parts: int) -> tuple[Tensor, Tensor]:
    """Of the rows that have a place: their copies, and how many tokens their bans leave in each part."""
    rows, vocab = logits.shape
    copies = torch.empty((edits.num_places, vocab), dtype=torch.int32, device=logits.device)
    left = torch.empty((edits.num_places, parts), dtype=torch.int32, device=logits.device)
    if edits.num_places:
        copy_edited[(rows, parts)](
            logits, logits.stride(0), vocab, copies.view(torch.float32), copies, left, edits.masks,
            edits.masks.shape[1], *edits[1:], PART=PART, num_warps=_WARPS, **registers(_MOST_REGISTERS),
        )  # fmt: skip
    return copies, left


def _scratch(rows: int, parts: int, device: torch.device, is_sampled: bool) -> Scratch:
    maxima = torch.empty((rows, parts), dtype=torch.float32, device=device)
    best = torch.empty((rows, parts), dtype=torch.int32, device=device)
    if not is_sampled:
        return Scratch(maxima, best, best, maxima, best, maxima, best)
    return Scratch(
        maxima,
        best,
        torch.empty((rows, parts, _BINS), dtype=torch.int16, device=device),
        torch.empty((rows, NUM_SUMS.value, parts), dtype=torch.float32, device=device),
        torch.empty((rows, 2), dtype=torch.int32, device=device),
        torch.empty((rows, PART), dtype=torch.float32, device=device),
        torch.empty((rows, PART), dtype=torch.int32, device=device),
    )


def _lost_bits(dtype: torch.dtype) -> int:
    """Of float32's 23 bits of mantissa."""
    return 23 + round(math.log2(torch.finfo(dtype).eps))


def sample(logits: Tensor, parameters: Parameters, edits: Edits | None = None, out: Sampled | None = None) -> Sampled:
    """As in reference.py."""
    return _sampled(logits, parameters, edits or (), out)


def greedy(logits: Tensor, out: Sampled | None = None) -> Sampled:
    """As in reference.py."""
    return _sampled(logits, (), (), out)


def _sampled(logits: Tensor, parameters: Sequence[Tensor], edits: Sequence[Tensor], out: Sampled | None) -> Sampled:
    if out is None:
        rows, device = len(logits), logits.device
        out = Sampled(
            torch.empty(rows, dtype=torch.int64, device=device), torch.empty(rows, dtype=torch.bool, device=device)
        )
    _sample_op(logits, parameters, edits, *out)
    return out


def configurations() -> Iterator[Configuration]:
    """Logits of both types; greedily, by parameters, and with edits."""
    common = dict(
        stride="i32:16", V="i32:16", temperature="*fp32", top_k="*i32", top_p="*fp32", min_p="*fp32", words="i32",
        draws="*fp32", mask_rows="*i32", masks="*i32", places="*i32", bans="*i32", ban_starts="*i32",
        copies="*fp32:16", left="*i32:16", tokens="*i64", finite="*u1",
    )  # fmt: skip
    drawn = Scratch("*fp32:16", "*i32:16", "*i16:16", "*fp32:16", "*i32:16", "*fp32:16", "*i32:16")
    greedy = drawn._replace(counts="*i32:16")
    parts = {"PARTS": 16, "PART": PART}
    most: dict[str, Any] = {"most_registers": _MOST_REGISTERS}
    for element, lost in (("bf16", 16), ("fp32", 0)):
        types = {"logits": f"*{element}:16"} | common
        for name, is_sampled, is_edited in (("greedy", False, False), ("", True, False), ("edited", True, True)):
            scratch = {"scratch": drawn if is_sampled else greedy}
            kind = {"EDITED": is_edited, **parts}
            both = {"SAMPLED": is_sampled, **kind}
            what = f"{name} {element}".strip()
            yield Configuration(f"scan {what}", _scan, types | scratch, {**both, "BINS": _BINS}, _WARPS)
            if is_sampled:
                constants = {**kind, "BLOCK": _GATHERED, "BINS": _BINS, "LOST": lost}
                yield Configuration(f"gather {what}", _gather, types | scratch, constants, _GATHER_WARPS, **most)
            yield Configuration(
                f"choose {what}",
                _choose,
                types | scratch,
                {**both, "BLOCK": _SEARCHED},
                _WARPS,
                **most,
            )
        lists = dict.fromkeys(("bias_starts", "bias_tokens", "history_starts", "history", "prompt_lens"), "*i32")
        lists |= dict.fromkeys(("biases", "presence", "frequency", "repetition"), "*fp32")
        counts = {"counts": "*i32:16"}
        yield Configuration(f"copy {element}", copy_edited, types | lists | counts, {"PART": PART}, _WARPS, **most)
