"""grouped_gemm: a mixture's experts, computed as products of each expert place with the rows that were routed to it.

An expert is two products with an activation between them. With the pairs, places and weights of expert_route, P = T * K
pairs of T tokens with K choices each, and pair p = pairs[position]:

    gate_up     h[position] = act(gate) * up,   where (gate, up) = gate_up_stack[place of p] @ x[token of p]
    down        rows[p]     = down_stack[place of p] @ h[position]
    combine     out[t]      = sum over k of weights[t, k] * rows[t * K + k], and what else is to be added

Running example, continued from expert_route: two tokens, two choices each.

    position            0  1  2  3
    pairs               3  1  2  0
    token of the pair   1  0  1  0
    place of the pair   0  3  3  7

h[1] is computed from x[0] with the matrices of place 3. down writes rows in order of pair number, so that combine finds
the choices of a token next to each other: out[0] = .6 * rows[0] + .4 * rows[1], out[1] = .7 * rows[2] + .3 * rows[3].

These are three launches. Where something is added to gate_up's products before the activation (LoRA), gate_up returns
the products themselves, [gate, up] by row, and activate is a fourth launch. Rows to which nothing was added come out as
they do of the one launch, to the bit, where tiles are of one height: in this product a row of the base does not feel
LoRA beside it. In steps with many more rows tiles are higher (tile_rows), and sums may be rounded otherwise.
"""

import torch
from torch import Tensor

from kernels.compiled import takes
from kernels.expert_route import Routed
from kernels.gated.activation import Act, Activation
from kernels.grouped_gemm import host, reference
from kernels.grouped_gemm.layout import Layout
from kernels.host import takes as host_takes

__all__ = ["Act", "Activation", "Layout", "activate", "combine", "down", "gate_up", "tile_rows"]

_ONE_TILE = 1 << 30  # more rows than any batch has


def tile_rows(x: Tensor, top_k: int, num_experts: int) -> int:
    """The most rows of a tile for x [T, ..], of which each goes to top_k of num_experts experts.

    So many that a matrix is seldom read twice, and no more. On the CPU all rows of a place are one tile.
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
    if host_takes(x):
        return host.gate_up(x, stack, routed, activation, layout, bias)
    return reference.gate_up(x, stack, routed, activation, layout, bias)


def activate(products: Tensor, activation: Activation, interleaved: bool, routed: Routed, dtype: torch.dtype) -> Tensor:
    """See reference.py for shapes."""
    if takes(products):
        from kernels.grouped_gemm import kernel

        return kernel.activate(products, activation, interleaved, routed, dtype)
    if host_takes(products):
        return host.activate(products, activation, interleaved, routed, dtype)
    return reference.activate(products, activation, interleaved, routed, dtype)


def down(h: Tensor, stack: Tensor, routed: Routed, layout: Layout, bias: Tensor | None = None) -> Tensor:
    """See reference.py for shapes."""
    if takes(h):
        from kernels.grouped_gemm import kernel

        return kernel.down(h, stack, routed, layout, bias)
    if host_takes(h):
        return host.down(h, stack, routed, layout, bias)
    return reference.down(h, stack, routed, layout, bias)


def combine(rows: Tensor, routed: Routed, beside: Tensor | None = None, only_own: bool = False) -> Tensor:
    """See reference.py for shapes."""
    if takes(rows):
        from kernels.grouped_gemm import kernel

        return kernel.combine(rows, routed, beside, only_own)
    if host_takes(rows):
        return host.combine(rows, routed, beside, only_own)
    return reference.combine(rows, routed, beside, only_own)
