"""What kernels share: a matrix product that the interpreter gets right, and how a kernel is listed for compilation.

Every kernel.py has a `configurations()`: the specialisations that are shipped. benchmarks/aot.py compiles each ahead of
time, without a GPU, and fails on a register spill (benchmarks/README.md).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton import knobs

INTERPRETED = bool(knobs.runtime.interpret)
_UPCAST = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b, accumulated in float32; float32 operands are multiplied in full precision.

    The interpreter keeps bfloat16 as raw bits and would multiply those, so there the operands are widened first.
    """
    if _UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


def stages(wanted: int) -> int:
    """Steps of a loop whose loads are under way at once; AMD's chips have a third of the shared memory."""
    return min(wanted, AMD_STAGES) if torch.version.hip else wanted


AMD_STAGES = 2
NVIDIA, AMD = ("sm_80", "sm_90"), ("gfx942",)


class Configuration(NamedTuple):
    """One specialisation of a kernel, as its launch function would ask for it."""

    name: str  # of the shape, within the kernel: "decode r16"
    kernel: Any  # the @triton.jit function
    types: Mapping[str, str]  # argument -> "*bf16", "*fp32", "*i32", "*i64", "i32", "fp32"
    constants: Mapping[str, Any]  # constexpr arguments
    aligned: tuple[str, ...] = ()  # arguments that are multiples of 16, as the launcher would find them
    num_warps: int = 4
    num_stages: int = 3
    targets: tuple[str, ...] = NVIDIA + AMD
