"""Reference and CPU path of lora: mixed ranks in one batch, each at its true rank.

Segments are contiguous, so each is two small products on views. One masked product over the ranks of all live adapters
costs every token all of them; with eight adapters it measured 1.5 to 4 times as slow (benchmarks/README.md).
"""

import torch
from torch import Tensor

from kernels.lora.site import LoraSite, Segments


def lora(y: Tensor, x: Tensor, site: LoraSite, segments: Segments, bias: Tensor | None = None) -> None:
    """Add in place: y[rows] += scale * b @ (a @ x[rows]) for each segment and slice that its adapter has weights for.

    y [T, sum of widths], whose rows are contiguous; x [T, in]. bias is what y holds already, for gains.
    """
    for start, end, slot in segments.spans:
        adapter = site.by_slot.get(slot)
        if adapter is None:
            continue
        inputs = x[start:end].chunk(len(site.widths), -1) if site.own_inputs else [x[start:end]] * len(site.widths)
        column = 0
        for rows, width, weights in zip(inputs, site.widths, adapter, strict=True):
            if weights is not None:
                out = y[start:end, column : column + width]
                a, b = (weights.a, weights.b) if site.transposed else (weights.a.t(), weights.b.t())
                out.addmm_(torch.mm(rows, a), b, alpha=weights.scale)
                if weights.gain is not None:
                    part = 0 if bias is None else bias[column : column + width]
                    out.copy_((out - part) * weights.gain + part)
            column += width
