"""Reference and CPU path of grouped_gemm.

A loop over the slots in use. torch's own grouped product walks all slots: it takes 0.7 times as long where all are
used, 2.6 times where one in 32 is (benchmarks/README.md). The stack may be an arena of which only the slots in use are
mapped: no other is ever read.
"""

import torch
from torch import Tensor

from kernels.expert_route import Buckets


def grouped_gemm(
    rows: Tensor, stack: Tensor, buckets: Buckets, bias: Tensor | None = None, transposed: bool = False
) -> Tensor:
    """out[i] = stack[s] @ rows[i] (+ bias[s]) for the rows i of each bucket s; returns [P, out].

    rows [P, in], in bucket order. stack [slots, out, in], or [slots, in, out] if transposed. bias [slots, out].
    """
    weights = stack if transposed else stack.transpose(-1, -2)  # [slots, in, out]
    products = [chunk @ weights[slot] for slot, chunk in zip(buckets.slots, rows.split(buckets.counts), strict=True)]
    if bias is not None:
        products = [product + bias[slot] for slot, product in zip(buckets.slots, products, strict=True)]
    return torch.cat(products)


def combine(rows: Tensor, buckets: Buckets, weights: Tensor) -> Tensor:
    """Undo the sort and sum each token's K choices in the router's order: rows [T * K, H], weights [T, K] -> [T, H]."""
    unsorted = torch.empty_like(rows)
    unsorted[buckets.pairs] = rows
    choices = unsorted.view(*weights.shape, -1)
    return torch.einsum("tkh,tk->th", choices, weights.to(rows.dtype))
