"""Weights that are finite, and whose products are not: each is tried on one input.

Norms give every linear inputs of about RMS 1. What a part adds to such an input's output is hardly ever above a few
hundred; beyond the largest float16 the model computes infinities or nonsense. This finds training that diverged. It is
no proof for other inputs, and the engine does not rely on it: a request whose logits are not finite fails alone.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from adapters_store.errors import InvalidAdapter, shown
from adapters_store.files import OpenFile
from adapters_store.operands import Floats, times
from adapters_store.parts import ExpertReplacement, LowRank, Part
from adapters_store.safetensors_file import MAX_WEIGHT

MAX_OUTPUT = MAX_WEIGHT


def check_outputs(parts: Sequence[Part], files: Mapping[str, OpenFile]) -> None:
    """Raises InvalidAdapter for a part whose output on an ordinary input exceeds MAX_OUTPUT. `files` by name, as they
    were hashed. Reads what it needs once more, a megabyte at a time."""
    for part in parts:
        largest = largest_output(part, files)
        if not largest <= MAX_OUTPUT:  # NaN is not
            reached = f"reaches {largest:,.0f}" if np.isfinite(largest) else "is not finite"
            raise InvalidAdapter(
                f"{_name(part)}: on an input of ordinary size what it computes {reached}, and {MAX_OUTPUT:,} is the "
                f"largest float16: training diverged{_or_scale(part)}; take an earlier checkpoint"
            )


def largest_output(part: Part, files: Mapping[str, OpenFile]) -> float:
    """The largest magnitude of what the part computes of the input: what it adds, or an expert's whole output."""
    with np.errstate(all="ignore"):
        y = _low_rank(part, files) if isinstance(part, LowRank) else _expert(part, files)
        return float(np.abs(y).max())


def _low_rank(part: LowRank, files: Mapping[str, OpenFile]) -> Floats:
    x = _input(part.a.shape[-1])
    rows = times(part.a, x[None] if part.is_in_experts else x, files)
    return np.float32(part.scale) * times(part.b, rows, files)


def _expert(part: ExpertReplacement, files: Mapping[str, OpenFile]) -> Floats:
    """With SiLU, as all bases that ESFT exists for; others let through as much."""
    x = _input(part.down.shape[0])
    gate, up = np.split(np.concatenate([times(tensor, x, files) for tensor in part.gate_up]), 2)
    return times(part.down, gate / (1 + np.exp(-gate)) * up, files)


def _input(width: int) -> Floats:
    """+1 and -1, without a pattern and always the same ones: [width], of RMS 1."""
    bits = np.unpackbits(np.frombuffer(hashlib.shake_256(b"an ordinary input").digest(width // 8 + 1), np.uint8))
    return bits[:width].astype(np.float32) * 2 - 1


def _or_scale(part: Part) -> str:
    return f", or its scale of {part.scale:g} is not that of its training" if isinstance(part, LowRank) else ""


def _name(part: Part) -> str:
    return shown(part.module) if isinstance(part, LowRank) else f"expert {part.expert} of layer {part.layer}"
