"""Triton form of the router's product: pieces of it, each for a block of tokens, of experts and of the depth.

A router is a small matrix, so few tokens would leave most of a GPU idle if nobody cut the depth. Each part of the depth
has a plane of logits of its own, and whoever chooses adds them up in order: what comes out does not depend on timing.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kernels.compiled.kernel import dot

_PIECES = 128  # that are enough for all of a GPU
_MOST_PLANES = 32
_EXPERTS = 64  # of a piece, at most
_NARROWEST = 16  # rows or columns of a product of matrices, at least


class Factors(NamedTuple):
    """What is multiplied, in a kernel pointers."""

    x: Any  # [T, H]
    weight: Any  # [M, H]


def cut(tokens: int, experts: int, hidden: int, itemsize: int) -> dict[str, int]:
    """How the product is cut, as constants: H deep, in pieces of PT tokens by PM experts by DEPTH, PD at a time, which
    makes PLANES of the depth. itemsize: of what is multiplied."""
    is_wide = itemsize == 4  # multiplied without matrix instructions, which takes registers
    rows = _NARROWEST if tokens <= 64 or is_wide else 4 * _NARROWEST
    columns = max(_NARROWEST, min(_EXPERTS // (2 if is_wide else 1), triton.next_power_of_2(experts)))
    step = _NARROWEST if is_wide else 128 * _NARROWEST // rows
    others = triton.cdiv(tokens, rows) * triton.cdiv(experts, columns)
    planes = min(_MOST_PLANES, max(1, _PIECES // others))
    depth = max(step, triton.next_power_of_2(triton.cdiv(hidden, planes)))
    return dict(H=hidden, PT=rows, PM=columns, PD=step, DEPTH=depth, PLANES=triton.cdiv(hidden, depth))


@triton.jit
def num_pieces(T, M: tl.constexpr, PT: tl.constexpr, PM: tl.constexpr, PLANES: tl.constexpr):
    return tl.cdiv(T, PT) * ((M + PM - 1) // PM * PLANES)


@triton.jit
def multiply_piece(
    piece, factors, planes, T,
    M: tl.constexpr, H: tl.constexpr, PT: tl.constexpr, PM: tl.constexpr, PD: tl.constexpr, DEPTH: tl.constexpr,
    AS_X: tl.constexpr,
):  # fmt: skip
    """Write one piece of planes [PLANES, T, M] float32. AS_X: as in RouterLinear; else both are widened to float32."""
    token_blocks = tl.cdiv(T, PT)
    expert_blocks: tl.constexpr = (M + PM - 1) // PM
    t = piece % token_blocks * PT + tl.arange(0, PT)
    e = piece // token_blocks % expert_blocks * PM + tl.arange(0, PM)
    plane = piece // (token_blocks * expert_blocks)
    d = tl.arange(0, PD)
    total = tl.zeros((PT, PM), tl.float32)
    for step in range(0, DEPTH, PD):
        k = plane * DEPTH + step + d
        rows = tl.load(factors.x + t[:, None] * H + k[None, :], mask=(t < T)[:, None] & (k < H)[None, :], other=0.0)
        weights = tl.load(factors.weight + e[None, :] * H + k[:, None], mask=(e < M)[None, :] & (k < H)[:, None],
                          other=0.0)  # fmt: skip
        if AS_X:
            weights = weights.to(rows.dtype)
        else:
            rows, weights = rows.to(tl.float32), weights.to(tl.float32)
        total = dot(rows, weights, total)
    tl.store(planes + (plane * T + t)[:, None] * M + e[None, :], total, mask=(t < T)[:, None] & (e < M)[None, :])
