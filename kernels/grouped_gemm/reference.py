"""Reference of grouped_gemm: a loop over the expert places in use.

torch's own grouped product walks over all places. It takes 0.7 times as long where all are in use, but 2.6 times as
long where one in 32 is (benchmarks/README.md). Besides, the stack may be an arena of which only the places in use are
mapped, so no other may be read.
"""

import torch
from torch import Tensor

from kernels.expert_route import Routed
from kernels.gated.activation import Activation
from kernels.gated.reference import gated
from kernels.grouped_gemm.layout import Layout


def gate_up(
    x: Tensor, stack: Tensor, routed: Routed, activation: Activation | None, layout: Layout, bias: Tensor | None = None
) -> Tensor:
    """act(gate(x)) * up(x) of each pair, by the matrices of its place.

    x [T, H]; stack [places, 2I, H], or as the layout says; bias [places, 2I]. Returns [P, I] in order of position: row
    i belongs to pair routed.pairs[i]. Rows behind the pairs of real tokens are not written.
    activation None: returns the products themselves, [P, 2I] with columns as the layout has them, to which something
    can be added before `activate`. They are in the type that the activation would have read, so that where nothing is
    added `activate` gives the same bits: here x's, in the kernel float32, whose sums have not been rounded yet.
    """
    tiles = _tiles(routed)
    rows = x[routed.pairs[: _num_rows(tiles)] // routed.places.shape[1]]
    products = _products(rows, stack, tiles, layout, bias)
    if activation is not None:
        products = gated(products, activation, layout.interleaved)
    return _behind(products, len(routed.pairs))


def activate(products: Tensor, activation: Activation, interleaved: bool, routed: Routed, dtype: torch.dtype) -> Tensor:
    """products [P, 2I], as gate_up returns them without an activation -> [P, I], as it returns them with one.

    products: in float32 or `dtype`. dtype: of what is returned, which is that of gate_up's x.
    """
    real = products[: int((routed.places >= 0).sum())]
    return _behind(gated(real, activation, interleaved).to(dtype), len(products))


def down(h: Tensor, stack: Tensor, routed: Routed, layout: Layout, bias: Tensor | None = None) -> Tensor:
    """h [P, I], as gate_up returns it; stack [places, H, I], or as the layout says; bias [places, H].

    Returns [P, H] in order of pair number. The rows of padding tokens are not written.
    """
    products = _products(h, stack, _tiles(routed), layout, bias)
    out = products.new_empty(len(routed.pairs), products.shape[-1])
    out[routed.pairs[: len(products)]] = products
    return out


def combine(rows: Tensor, routed: Routed, beside: Tensor | None = None, only_own: bool = False) -> Tensor:
    """Each token's K choices, weighted and summed: rows [T * K, H] in order of pair number -> [T, H].

    Rows of choices without a place are not read; what they give is 0. beside [T, H]: added to that; where only_own (as
    in Shared) to tokens whose last choice has no place.
    """
    choices = rows.view(*routed.weights.shape, -1)
    padding = routed.places[..., None] < 0
    if bool(padding.any()):
        choices = choices.masked_fill(padding, 0)
    out = torch.einsum("tkh,tk->th", choices, routed.weights.to(rows.dtype))
    if beside is None:
        return out
    return out + (beside.masked_fill(routed.places[:, -1:] >= 0, 0) if only_own else beside)


def _tiles(routed: Routed) -> list[list[int]]:
    """(place, first position, rows) of each, in order of position."""
    return sorted(routed.tiles[: int(routed.num_tiles)].tolist(), key=lambda tile: tile[1])


def _num_rows(tiles: list[list[int]]) -> int:
    return sum(count for _, _, count in tiles)


def _products(rows: Tensor, stack: Tensor, tiles: list[list[int]], layout: Layout, bias: Tensor | None) -> Tensor:
    """Each tile's rows times its place's matrix, one after another."""
    weights = stack if layout.transposed else stack.transpose(-1, -2)  # [places, in, out]
    products = [rows[start : start + count] @ weights[place] for place, start, count in tiles]
    if bias is not None:
        products = [product + bias[place] for product, (place, _, _) in zip(products, tiles, strict=True)]
    return torch.cat(products) if products else rows.new_empty(0, weights.shape[-1])


def _behind(rows: Tensor, count: int) -> Tensor:
    """`rows` with as many unwritten ones behind as make `count`."""
    return rows if len(rows) == count else torch.cat([rows, rows.new_empty(count - len(rows), rows.shape[-1])])
