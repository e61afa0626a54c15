"""grouped_gemm: a mixture's experts as grouped products over the buckets that expert_route made.

gate_up (with the activation), down, combine: three launches. Where something is added to gate_up's products before the
activation (LoRA), gate_up leaves it out and activate is a fourth.
"""

from torch import Tensor

from kernels.compiled import takes
from kernels.expert_route import Routed
from kernels.grouped_gemm import reference
from kernels.grouped_gemm.layout import Act, Activation, Layout

__all__ = ["Act", "Activation", "Layout", "activate", "combine", "down", "gate_up", "tile_rows"]

_ONE_TILE = 1 << 30


def tile_rows(x: Tensor, top_k: int, num_experts: int) -> int:
    """The most rows of a tile for this batch: so many that a matrix is seldom read twice, and no more.

    On the CPU a place's rows are one product.
    """
    if not takes(x):
        return _ONE_TILE
    from kernels.grouped_gemm import kernel

    return kernel.tile_rows(x.shape[0] * top_k, num_experts)


def gate_up(
    x: Tensor, stack: Tensor, routed: Routed, activation: Activation | None, layout: Layout, bias: Tensor | None = None
) -> Tensor:
    """See reference.py for shapes."""
    if takes(x):
        from kernels.grouped_gemm import kernel

        return kernel.gate_up(x, stack, routed, activation, layout, bias)
    return reference.gate_up(x, stack, routed, activation, layout, bias)


def activate(products: Tensor, activation: Activation, interleaved: bool, routed: Routed) -> Tensor:
    """See reference.py for shapes."""
    if takes(products):
        from kernels.grouped_gemm import kernel

        return kernel.activate(products, activation, interleaved, routed)
    return reference.activate(products, activation, interleaved, routed)


def down(h: Tensor, stack: Tensor, routed: Routed, layout: Layout, bias: Tensor | None = None) -> Tensor:
    """See reference.py for shapes."""
    if takes(h):
        from kernels.grouped_gemm import kernel

        return kernel.down(h, stack, routed, layout, bias)
    return reference.down(h, stack, routed, layout, bias)


def combine(rows: Tensor, routed: Routed) -> Tensor:
    """See reference.py for shapes."""
    if takes(rows):
        from kernels.grouped_gemm import kernel

        return kernel.combine(rows, routed)
    return reference.combine(rows, routed)
