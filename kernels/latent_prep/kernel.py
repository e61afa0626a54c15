"""Triton form of latent_prep: of each token one program for its latent and key, and one for every few heads."""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from kernels.compiled.kernel import Configuration
from kernels.compiled.launch import launch
from kernels.latent_prep.pairing import Pairing, Turns

_HEADS = 16  # of a program


@triton.jit
def _rotate(source, target, cos, sin, rows, there, row_stride, target_stride, ROTARY: tl.constexpr, HALF: tl.constexpr,
            ROWS: tl.constexpr, PAIRS_IN: tl.constexpr, PAIRS_OUT: tl.constexpr):  # fmt: skip
    """ROWS rows of ROTARY elements. cos, sin [HALF] float32. PAIRS_IN, PAIRS_OUT: elements of a pair are neighbours."""
    column = tl.arange(0, HALF)[None, :]
    both = tl.arange(0, 2 * HALF)[None, :]
    come, go = source + (rows * row_stride)[:, None], target + (rows * target_stride)[:, None]
    if PAIRS_IN:
        pairs = tl.load(come + both, mask=there[:, None] & (both < ROTARY), other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(pairs, (ROWS, HALF, 2)))
    else:
        a = tl.load(come + column, mask=there[:, None] & (column < ROTARY // 2), other=0.0).to(tl.float32)
        b = tl.load(come + ROTARY // 2 + column, mask=there[:, None] & (column < ROTARY // 2), other=0.0)
        b = b.to(tl.float32)
    real = (a * cos[None, :] - b * sin[None, :]).to(target.dtype.element_ty)
    imaginary = (b * cos[None, :] + a * sin[None, :]).to(target.dtype.element_ty)
    if PAIRS_OUT:
        pairs = tl.reshape(tl.join(real, imaginary), (ROWS, 2 * HALF))
        tl.store(go + both, pairs, mask=there[:, None] & (both < ROTARY))
    else:
        tl.store(go + column, real, mask=there[:, None] & (column < ROTARY // 2))
        tl.store(go + ROTARY // 2 + column, imaginary, mask=there[:, None] & (column < ROTARY // 2))


@triton.jit
def _prepare(
    query, compressed, weight, cos, sin, cache, slot_mapping, absorbed,  # as in reference.py
    query_stride, query_head_stride, compressed_stride, turn_stride, turn_step, block_stride, offset_stride,
    absorbed_stride, absorbed_head_stride, eps, offset,
    HEADS: tl.constexpr, LATENT: tl.constexpr, ROTARY: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    PADDED: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, CAST_FIRST: tl.constexpr, PAIRS_IN: tl.constexpr,
    PAIRS_OUT: tl.constexpr,
):  # fmt: skip
    """Programs: (token, 0 for its latent and key, else some heads)."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    pair = tl.arange(0, HALF)
    turns = token * turn_stride + pair * turn_step
    c = tl.load(cos + turns, mask=pair < ROTARY // 2, other=0.0).to(tl.float32)
    s = tl.load(sin + turns, mask=pair < ROTARY // 2, other=0.0).to(tl.float32)
    if group > 0:
        heads = (group - 1) * ROWS + tl.arange(0, ROWS)
        _rotate(query + token * query_stride, absorbed + token * absorbed_stride + LATENT, c, s, heads, heads < HEADS,
                query_head_stride, absorbed_head_stride, ROTARY, HALF, ROWS, PAIRS_IN, PAIRS_OUT)  # fmt: skip
    else:
        kv_slot = tl.load(slot_mapping + token).to(tl.int64)
        if kv_slot >= 0:
            source = compressed + token * compressed_stride
            target = cache + (kv_slot // BLOCK_SIZE) * block_stride + (kv_slot % BLOCK_SIZE) * offset_stride
            column = tl.arange(0, PADDED)
            there = column < LATENT
            latent = tl.load(source + column, mask=there, other=0.0).to(tl.float32)
            normed = latent * tl.rsqrt(tl.sum(latent * latent, 0) / LATENT + eps)
            if CAST_FIRST:
                normed = normed.to(cache.dtype.element_ty).to(tl.float32)
            scale = tl.load(weight + column, mask=there, other=0.0).to(tl.float32) + offset
            tl.store(target + column, (normed * scale).to(cache.dtype.element_ty), mask=there)
            one = tl.arange(0, 1)
            _rotate(source + LATENT, target + LATENT, c, s, one, one == 0, 0, 0, ROTARY, HALF, 1, PAIRS_IN, PAIRS_OUT)


def _constants(
    heads: int, latent: int, rotary: int, block_size: int, cast_first: bool, pairing: Pairing
) -> dict[str, int | bool]:
    return {
        "HEADS": heads, "LATENT": latent, "ROTARY": rotary, "BLOCK_SIZE": block_size,
        "PADDED": triton.next_power_of_2(latent), "HALF": triton.next_power_of_2(rotary // 2), "ROWS": _HEADS,
        "CAST_FIRST": cast_first, "PAIRS_IN": pairing != Pairing.HALVES, "PAIRS_OUT": pairing == Pairing.ADJACENT,
    }  # fmt: skip


@launch("latent_prep", mutates_args=("cache", "absorbed"))
def _launch(
    query: Tensor, compressed: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool, cos: Tensor,
    sin: Tensor, pairing: int, cache: Tensor, slot_mapping: Tensor, absorbed: Tensor,
) -> None:  # fmt: skip
    if not len(query):
        return
    heads, rotary = query.shape[1:]
    latent = compressed.shape[-1] - rotary
    assert rotary % 2 == 0 and cos.stride() == sin.stride() and weight.is_contiguous()
    assert cache.shape[2:] == (1, latent + rotary) and absorbed.shape[1:] == (heads, latent + rotary)
    assert query.stride(-1) == compressed.stride(-1) == cache.stride(-1) == absorbed.stride(-1) == 1
    constants = _constants(heads, latent, rotary, cache.shape[1], cast_first, Pairing(pairing))
    _prepare[(len(query), 1 + triton.cdiv(heads, _HEADS))](
        query, compressed, weight, cos, sin, cache, slot_mapping, absorbed, *query.stride()[:2], compressed.stride(0),
        *cos.stride(), *cache.stride()[:2], *absorbed.stride()[:2], eps, offset, **constants, num_warps=_WARPS,
    )  # fmt: skip


_WARPS = 4


@_launch.register_fake
def _(*_: object) -> None:
    return None


def latent_prep(
    query: Tensor, compressed: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool, turns: Turns,
    cache: Tensor, slot_mapping: Tensor, absorbed: Tensor,
) -> None:  # fmt: skip
    """As the reference. All are contiguous in the last dimension, but for turns."""
    _launch(query, compressed, weight, eps, offset, cast_first, turns.cos, turns.sin, turns.pairing, cache,
            slot_mapping, absorbed)  # fmt: skip


# (name, heads, L, R, pairing, element, element of cosines) of what is compiled ahead of time
_SHAPES = (
    ("16 heads bf16", 16, 512, 64, Pairing.ADJACENT, "bf16", "fp32"),
    ("128 heads bf16", 128, 512, 64, Pairing.INTERLEAVED, "bf16", "bf16"),
    ("40 heads bf16", 40, 256, 32, Pairing.HALVES, "bf16", "bf16"),
    ("16 heads fp32", 16, 512, 64, Pairing.ADJACENT, "fp32", "fp32"),
)


def configurations() -> Iterator[Configuration]:
    """As DeepSeek-V2-Lite, DeepSeek-V3 and MiniCPM3 launch it."""
    for name, heads, latent, rotary, pairing, element, turns in _SHAPES:
        constants = _constants(heads, latent, rotary, 16, True, pairing)
        types = {it: "i32:16" for it in _prepare.arg_names if it not in constants}
        types |= {it: f"*{element}:16" for it in ("query", "compressed", "weight", "cache", "absorbed")}
        types |= {"slot_mapping": "*i32:16", "eps": "fp32", "offset": "fp32", "cos": f"*{turns}:16"}
        if pairing == Pairing.ADJACENT:  # cosines and sines lie in one tensor, side by side
            types |= {"sin": f"*{turns}", "turn_step": "i32"}
        else:
            types |= {"sin": f"*{turns}:16", "turn_step": "i32:1"}
        yield Configuration(name, _prepare, types, constants, _WARPS)
