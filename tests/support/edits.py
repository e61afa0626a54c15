"""Edits of rows, from what is wanted of each."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TypedDict

import torch
from torch import Tensor

from kernels.sampling import Edits
from tests.support.kernel_device import DEVICE


class Wanted(TypedDict, total=False):
    """All of it may be left out."""

    allowed: Sequence[int]  # by the mask
    bias: Mapping[int, float]
    bans: Sequence[int]
    history: tuple[list[int], list[int]]  # prompt and output
    penalties: tuple[float, float, float]  # presence, frequency, repetition


def edits_of(vocab: int, wanted: Sequence[Wanted]) -> Edits:
    """Of a row for each. Places are given from the last row on: nothing says that they are in order."""
    masked = [row for row, it in enumerate(wanted) if "allowed" in it]
    placed = [row for row, it in reversed([*enumerate(wanted)]) if it.keys() - {"allowed"}]
    its = [wanted[row] for row in placed]
    histories = [it.get("history", ([], [])) for it in its]
    presence, frequency, repetition = torch.tensor([it.get("penalties", (0.0, 0.0, 1.0)) for it in its]).view(-1, 3).T
    bias_starts, bias_tokens = _lists([[*it.get("bias", {})] for it in its])
    edits = Edits(
        _masks([[*wanted[row]["allowed"]] for row in masked], vocab),
        _numbered(masked, len(wanted)),
        _numbered(placed, len(wanted)),
        bias_starts,
        bias_tokens,
        torch.tensor([value for it in its for value in it.get("bias", {}).values()], dtype=torch.float32),
        *_lists([[*it.get("bans", ())] for it in its]),
        *_lists([prompt + output for prompt, output in histories]),
        torch.tensor([len(prompt) for prompt, _ in histories], dtype=torch.int32),
        *(it.contiguous() for it in (presence, frequency, repetition)),
    )
    return Edits(*(it.to(DEVICE) for it in edits))


def _masks(allowed: list[list[int]], vocab: int) -> Tensor:
    bits = torch.zeros(len(allowed), -(-vocab // 32) * 32, dtype=torch.int64)
    for row, tokens in zip(bits, allowed, strict=True):
        row[tokens] = 1
    return (bits.view(len(allowed), bits.shape[1] // 32, 32) << torch.arange(32)).sum(-1).to(torch.int32)


def _numbered(rows: list[int], count: int) -> Tensor:
    numbers = torch.full((count,), -1, dtype=torch.int32)
    numbers[rows] = torch.arange(len(rows), dtype=torch.int32)
    return numbers


def _lists(parts: list[list[int]]) -> tuple[Tensor, Tensor]:
    starts = torch.tensor([0, *accumulate(map(len, parts))], dtype=torch.int32)
    return starts, torch.tensor([token for part in parts for token in part], dtype=torch.int32)
