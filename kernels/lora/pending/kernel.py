"""What every consumer of a Delta launches its kernel with."""

from typing import Any

import torch
from torch import Tensor

from kernels.adapter_rows import FEW_TILE_ROWS
from kernels.compiled.kernel import multiprocessors
from kernels.lora.kernel import RANKS, TRITON_TYPES, splits_of
from kernels.lora.products.kernel import Pending

TILE = FEW_TILE_ROWS  # rows of a tile: with more in one, lora's two launches cost nothing to speak of


def pending_of(
    z: Tensor, table: Tensor, offsets: Tensor, bias: Tensor | None, tiles: Tensor, num_tiles: Tensor, y: Tensor
) -> Pending:
    """y: stands in for the bias where there is none, since an argument that is not read still needs a pointer."""
    return Pending(z, y if bias is None else bias, table, table.stride(0), offsets, tiles, num_tiles)


def constants_of(splits: int, slices: int, dtype: torch.dtype, has_bias: bool) -> dict[str, Any]:
    return dict(HAS_BIAS=has_bias, SL=slices, SPLITS=splits, RB=RANKS, DT=TRITON_TYPES[dtype], TILE=TILE)


def programs(items: int, x: Tensor) -> int:
    """Of which each takes every so manieth item."""
    return min(items, 4 * multiprocessors(x))


def types_of(element: str) -> Pending:
    """Of a Pending in a Configuration, with a bias that is of the elements' type."""
    return Pending("*fp32:16", f"*{element}:16", "*i64:16", "i32", "*i32:16", "*i32:16", "*i32")


def configured(depth: int, slices: int, element: str, has_bias: bool = False) -> dict[str, Any]:
    """Constants for the products of linears that read so many columns."""
    dtype = torch.bfloat16 if element == "bf16" else torch.float32
    return constants_of(splits_of(depth, TILE), slices, dtype, has_bias)
