"""Triton form of rope: a program rotates a few heads of one token. The queries' heads come first, then the keys'.

One launch does both. Pairs that lie next to each other are loaded together and parted in registers: every other element
would be read one at a time.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compiled.kernel import Configuration, integer
from kernels.compiled.launch import launch

_HEADS = 8  # heads a program


@triton.jit
def _rotate(
    x,  # the token's row, heads x_head apart
    out,  # the token's row, [heads, D]
    first_head,
    heads,
    x_head,
    cos,  # [HALF] float32, as sin
    sin,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS_IN: tl.constexpr,
    PAIRS_OUT: tl.constexpr,
):
    """HEADS heads from first_head on. PAIRS_IN, PAIRS_OUT: elements of a pair are neighbours, else D / 2 apart."""
    head = first_head + tl.arange(0, HEADS)
    mine = (head < heads)[:, None]
    source, target = x + (head * x_head)[:, None], out + (head * D)[:, None]
    column = tl.arange(0, HALF)[None, :]
    both = tl.arange(0, 2 * HALF)[None, :]
    if PAIRS_IN:  # one contiguous load, split in registers
        pairs = tl.load(source + both, mask=mine & (both < D), other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(pairs, (HEADS, HALF, 2)))
    else:
        a = tl.load(source + column, mask=mine & (column < D // 2), other=0.0).to(tl.float32)
        b = tl.load(source + D // 2 + column, mask=mine & (column < D // 2), other=0.0).to(tl.float32)
    real = a * cos[None, :] - b * sin[None, :]
    imaginary = b * cos[None, :] + a * sin[None, :]
    if PAIRS_OUT:
        pairs = tl.reshape(tl.join(real, imaginary), (HEADS, 2 * HALF))
        tl.store(target + both, pairs.to(out.dtype.element_ty), mask=mine & (both < D))
    else:
        tl.store(target + column, real.to(out.dtype.element_ty), mask=mine & (column < D // 2))
        tl.store(target + D // 2 + column, imaginary.to(out.dtype.element_ty), mask=mine & (column < D // 2))


@triton.jit
def _rope(
    query,  # head h of token t at h * q_head + t * q_token; as key
    key,
    cos,  # pair i of token t at t * turn_token + i * turn_pair; as sin
    sin,
    query_out,  # [T, query_heads, D], contiguous
    key_out,  # [T, key_heads, D], contiguous
    query_heads,
    key_heads,
    q_head,
    q_token,
    k_head,
    k_token,
    turn_token,
    turn_pair,
    D: tl.constexpr,
    HALF: tl.constexpr,  # D / 2 rounded up to a power of two
    HEADS: tl.constexpr,
    PAIRS_IN: tl.constexpr,
    PAIRS_OUT: tl.constexpr,
):
    """Programs: (token, some heads)."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    pair = tl.arange(0, HALF)
    at = token * turn_token + pair * turn_pair
    c = tl.load(cos + at, mask=pair < D // 2, other=0.0).to(tl.float32)
    s = tl.load(sin + at, mask=pair < D // 2, other=0.0).to(tl.float32)
    query_groups = tl.cdiv(query_heads, HEADS)
    if group < query_groups:
        _rotate(
            query + token * q_token, query_out + token * query_heads * D, group * HEADS, query_heads, q_head, c, s,
            D, HALF, HEADS, PAIRS_IN, PAIRS_OUT,
        )  # fmt: skip
    else:
        _rotate(
            key + token * k_token, key_out + token * key_heads * D, (group - query_groups) * HEADS, key_heads, k_head,
            c, s, D, HALF, HEADS, PAIRS_IN, PAIRS_OUT,
        )  # fmt: skip


def _launch(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, pairs_in: bool, pairs_out: bool
) -> tuple[Tensor, Tensor]:
    """cos and sin [1, T, at least D / 2], with the same strides."""
    batch, query_heads, tokens, width = query.shape
    key_heads = key.shape[1]
    assert batch == 1 and width % 2 == 0 and key.shape == (1, key_heads, tokens, width)
    assert cos.shape[:2] == (1, tokens) and cos.shape[2] >= width // 2 and cos.stride() == sin.stride()
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    outs = _outputs(query, key)
    if tokens:
        constants = _constants(width, pairs_in, pairs_out)
        groups = triton.cdiv(query_heads, _HEADS) + triton.cdiv(key_heads, _HEADS)
        _rope[(tokens, groups)](
            query, key, cos, sin, *outs, query_heads, key_heads, query.stride(1), query.stride(2), key.stride(1),
            key.stride(2), cos.stride(1), cos.stride(2), **constants, num_warps=_warps(constants["HALF"]),
        )  # fmt: skip
    return outs[0], outs[1]


def _constants(width: int, pairs_in: bool, pairs_out: bool) -> dict[str, int]:
    return dict(D=width, HALF=triton.next_power_of_2(width // 2), HEADS=_HEADS, PAIRS_IN=pairs_in, PAIRS_OUT=pairs_out)


def _warps(half: int) -> int:
    return min(4, max(1, half // 32))


def _outputs(query: Tensor, key: Tensor) -> list[Tensor]:
    """[1, heads, T, D] of which transpose(1, 2) is contiguous."""
    return [
        torch.empty((1, x.shape[2], x.shape[1], x.shape[3]), dtype=x.dtype, device=x.device).transpose(1, 2)
        for x in (query, key)
    ]


@launch("rope")
def rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """As in reference.py."""
    return _launch(query, key, cos, sin, interleaved, False)


@launch("rope_complex")
def rope_complex(query: Tensor, key: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """As in reference.py."""
    return _launch(query, key, frequencies[..., 0], frequencies[..., 1], True, True)


@rope.register_fake
def _(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    query_out, key_out = _outputs(query, key)
    return query_out, key_out


@rope_complex.register_fake
def _(query: Tensor, key: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    query_out, key_out = _outputs(query, key)
    return query_out, key_out


# (name, query heads, key heads, D, pairs in, pairs out, element, element of cosines) of what is compiled ahead of time
_SHAPES = (
    ("halves 64 bf16", 64, 8, 64, False, False, "bf16", "bf16"),
    ("halves 128 bf16", 32, 8, 128, False, False, "bf16", "bf16"),
    ("halves 128 fp32", 32, 8, 128, False, False, "fp32", "fp32"),
    ("halves 96 bf16", 32, 32, 96, False, False, "bf16", "bf16"),
    ("halves 256 bf16", 16, 8, 256, False, False, "bf16", "bf16"),
    ("pairs to halves 64 bf16", 128, 1, 64, True, False, "bf16", "bf16"),
    ("pairs 64 bf16", 16, 1, 64, True, True, "bf16", "fp32"),
)


def configurations() -> Iterator[Configuration]:
    """As gpt-oss, Llama (twice), Phi-3, Gemma 2, DeepSeek-V3 and DeepSeek-V2-Lite launch it."""
    for name, query_heads, key_heads, width, pairs_in, pairs_out, element, turns in _SHAPES:
        types = {x: f"*{element}:16" for x in ("query", "key", "query_out", "key_out")}
        types |= {"query_heads": integer(query_heads), "key_heads": integer(key_heads), "cos": f"*{turns}:16"}
        types |= {x: "i32:16" for x in ("q_head", "q_token", "k_head", "k_token", "turn_token")}
        if pairs_out:  # cosines and sines lie in one tensor, side by side
            types |= {"sin": f"*{turns}", "turn_pair": "i32"}
        else:
            types |= {"sin": f"*{turns}:16", "turn_pair": "i32:1"}
        constants = _constants(width, pairs_in, pairs_out)
        yield Configuration(name, _rope, types, constants, _warps(constants["HALF"]))
