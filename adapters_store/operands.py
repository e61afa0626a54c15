"""What an operand says, read from its files a block at a time: a matrix may be larger than the memory for all of them.

Running example: one expert's B of 4, at rank 2, is the block [1, out, 2] of what is stored as [out, 2, 4]. It comes as
[1, rows, 2], some rows at a time, each of which was read with the numbers of all four.
"""

from collections.abc import Iterator, Mapping
from itertools import product as combinations
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters_store.files import OpenFile
from adapters_store.parts import BYTES_PER_ELEMENT, Operand, TensorRef, Whole

_BLOCK_BYTES = 1 << 20  # as stored: with its float32 it stays in a core's cache

Floats = NDArray[np.float32]


def times(operand: Operand, x: Floats, files: Mapping[str, OpenFile]) -> Floats:
    """operand [out, in] with x [in], or [M or 1, out, in] with x [M or 1, in]. `files` by name."""
    stack = np.broadcast_shapes(operand.shape[:-2], x.shape[:-1])
    y = np.zeros((*stack, operand.shape[-2]), np.float32)
    for piece in operand.pieces:
        for start, block in blocks(piece.tensor, files[piece.tensor.file]):
            *expert, rows, columns = (
                slice(begin + at, begin + at + size)
                for begin, at, size in zip(piece.start, start, block.shape, strict=True)
            )
            every = [slice(None)] * len(expert)
            of_x = every if 1 in (operand.shape[0], x.shape[0]) else expert
            of_y = every if operand.shape[0] == 1 else expert
            y[(*of_y, rows)] += piece.factor * np.matmul(block, x[(*of_x, columns)][..., None])[..., 0]
    return y


def blocks(tensor: TensorRef, file: OpenFile) -> Iterator[tuple[tuple[int, ...], Floats]]:
    """The tensor in blocks, each with where in it the block begins. They cover it, and do not overlap."""
    dimensions = range(len(tensor.shape))
    whole = tensor.cut_from or Whole(tensor.shape, (0,) * len(tensor.shape))
    order = whole.order or tuple(dimensions)
    # from here on by dimension of what is stored: where the cut begins in it, how much it takes
    begins = [whole.start[order.index(dimension)] for dimension in dimensions]
    counts = [tensor.shape[order.index(dimension)] for dimension in dimensions]
    sizes = [BYTES_PER_ELEMENT[tensor.dtype] * prod(whole.shape[dimension + 1 :]) for dimension in dimensions]
    # the outermost dimension of which a block has several; those before it one at a time, those behind it whole
    split = next((dimension for dimension in dimensions if sizes[dimension] <= _BLOCK_BYTES), dimensions[-1])
    inside = tuple(slice(begins[it], begins[it] + counts[it]) for it in dimensions[split + 1 :])
    step = max(1, _BLOCK_BYTES // sizes[split])
    for outer in combinations(*map(range, counts[:split])):
        for row in range(0, counts[split], step):
            rows, start = min(step, counts[split] - row), (*outer, row)
            at = sum(size * (begin + its) for size, begin, its in zip(sizes, begins, start, strict=False))
            raw = np.empty(rows * sizes[split], np.uint8)
            file.read_into(tensor.offset + at, raw.data)
            stored = _decoded(raw, tensor.dtype).reshape((1,) * split + (rows, *whole.shape[split + 1 :]))
            block = stored[(slice(None),) * (split + 1) + inside].transpose(order)
            padded = start + (0,) * len(inside)
            yield tuple(padded[dimension] for dimension in order), np.ascontiguousarray(block)


def _decoded(raw: NDArray[np.uint8], dtype: str) -> NDArray[Any]:
    """float32. A bfloat16 is the upper half of one."""
    if dtype == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(np.float16 if dtype == "F16" else np.float32).astype(np.float32, copy=False)
