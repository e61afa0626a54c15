"""Reference and CPU path of grouped_gemm.

The stack may be an arena of which only the slots in use are mapped: no other slot is ever read.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.expert_route import Buckets

# torch's own grouped product walks every slot of the stack, used or not; it wins unless few are used
# (benchmarks/README.md)
_MAX_SLOTS_PER_USED = 4


def grouped_gemm(
    rows: Tensor, stack: Tensor, buckets: Buckets, bias: Tensor | None = None, transposed: bool = False
) -> Tensor:
    """out[i] = stack[s] @ rows[i] (+ bias[s]) for the rows i of each bucket s; returns [P, out].

    rows [P, in], in bucket order. stack [slots, out, in], or [slots, in, out] if transposed. bias [slots, out].
    """
    used, counts = buckets.slots, buckets.counts
    weights = stack if transposed else stack.transpose(-1, -2)  # [slots, in, out]
    aligned = all(tensor.shape[-1] * tensor.itemsize % 16 == 0 for tensor in (rows, stack))  # torch insists on it
    if bias is None and aligned and len(rows) > len(used) and used[-1] < _MAX_SLOTS_PER_USED * len(used):
        ends = torch.zeros(used[-1] + 1, dtype=torch.int32)
        ends[used] = torch.tensor(counts, dtype=torch.int32)
        return F.grouped_mm(rows, weights[: used[-1] + 1], offs=ends.cumsum(0, dtype=torch.int32))
    products = [chunk @ weights[slot] for slot, chunk in zip(used, rows.split(counts), strict=True)]
    if bias is not None:
        products = [product + bias[slot] for slot, product in zip(used, products, strict=True)]
    return torch.cat(products)


def combine(rows: Tensor, buckets: Buckets, weights: Tensor) -> Tensor:
    """Undo the sort and sum each token's K choices in the router's order: rows [T * K, H], weights [T, K] -> [T, H]."""
    unsorted = torch.empty_like(rows)
    unsorted[buckets.pairs] = rows
    choices = unsorted.view(*weights.shape, -1)
    return torch.einsum("tkh,tk->th", choices, weights.to(rows.dtype))
