"""Triton form of the activations: a function for gate_up's kernel, and a kernel of its own."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compiled.kernel import Configuration
from kernels.compiled.launch import launch
from kernels.expert_route import Routed
from kernels.gated.activation import Act, Activation

_COLUMNS = 512  # of a program
_SILU, _GELU_TANH, _GELU = tl.constexpr(int(Act.SILU)), tl.constexpr(int(Act.GELU_TANH)), tl.constexpr(int(Act.GELU))


@triton.jit
def _gelu_tanh(x):
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return 0.5 * x * (2 * tl.sigmoid(2 * inner))  # 1 + tanh(z) = 2 sigmoid(2 z)


@triton.jit
def act(gate, up, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """ACT: the number of an Act. ALPHA and LIMIT are those of an Activation."""
    if ACT == _SILU:
        return gate * tl.sigmoid(gate) * up
    elif ACT == _GELU_TANH:
        return _gelu_tanh(gate) * up
    elif ACT == _GELU:
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    else:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        return (up + 1.0) * gate * tl.sigmoid(gate * ALPHA)


@triton.jit
def activate_kernel(
    products, num_pairs, h,
    I: tl.constexpr, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, INTERLEAVED: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """h[position] = act(gate) * up; products [P, 2I], h [P, I]. Programs: (position, block of columns).

    It computes in float32 what gate_up's kernel does of its sums, which products of float32 are.

    Positions from num_pairs [1] on hold anything, and are left alone.
    """
    position = tl.program_id(0)
    if position < tl.load(num_pairs):
        row = products + position.to(tl.int64) * (2 * I)
        n = tl.program_id(1) * BN + tl.arange(0, BN)
        if INTERLEAVED:
            both_at = tl.program_id(1) * (2 * BN) + tl.arange(0, 2 * BN)
            both = tl.load(row + both_at, mask=both_at < 2 * I, other=0.0).to(tl.float32)
            gate, up = tl.split(tl.reshape(both, (BN, 2)))
        else:
            gate = tl.load(row + n, mask=n < I, other=0.0).to(tl.float32)
            up = tl.load(row + I + n, mask=n < I, other=0.0).to(tl.float32)
        out = act(gate, up, ACT, ALPHA, LIMIT)
        tl.store(h + position.to(tl.int64) * I + n, out.to(h.dtype.element_ty), mask=n < I)


def _constants(inner: int, act: int, alpha: float, limit: float, interleaved: bool) -> dict[str, int | float]:
    return dict(I=inner, ACT=int(act), ALPHA=alpha, LIMIT=limit, INTERLEAVED=interleaved,
                BN=min(_COLUMNS, triton.next_power_of_2(inner)))  # fmt: skip


@launch("expert_activate")
def _activate(
    products: Tensor, num_pairs: Tensor, act: int, alpha: float, limit: float, interleaved: bool, dtype: torch.dtype
) -> Tensor:
    inner = products.shape[1] // 2
    h = products.new_empty(products.shape[0], inner, dtype=dtype)
    constants = _constants(inner, act, alpha, limit, interleaved)
    activate_kernel[(products.shape[0], triton.cdiv(inner, constants["BN"]))](products, num_pairs, h, **constants)
    return h


@_activate.register_fake
def _(
    products: Tensor, num_pairs: Tensor, act: int, alpha: float, limit: float, interleaved: bool, dtype: torch.dtype
) -> Tensor:
    return products.new_empty(products.shape[0], products.shape[1] // 2, dtype=dtype)


def activate(products: Tensor, activation: Activation, interleaved: bool, routed: Routed, dtype: torch.dtype) -> Tensor:
    """As in reference.py."""
    assert routed.num_pairs is not None
    return _activate(products, routed.num_pairs, int(activation.act), activation.alpha, activation.limit, interleaved,
                     dtype)  # fmt: skip


def configurations() -> Iterator[Configuration]:
    """DeepSeek-V2-Lite's and gpt-oss's."""
    types = dict(products="*fp32:16", num_pairs="*i32", h="*bf16:16")
    for name, *own in (("v2-lite", 1408, Act.SILU, 1.0, 0.0, False), ("gpt-oss", 2880, Act.CLAMPED, 1.702, 7.0, True)):
        yield Configuration(f"activate {name}", activate_kernel, types, _constants(*own))
