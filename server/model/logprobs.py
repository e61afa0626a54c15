"""Log-probabilities of the rows of a step, on their way from the device."""

import math
from collections.abc import Sequence

from torch import Tensor

import kernels.logprobs
from server.engine.request import Logprobs
from server.model.copies import ToHost


class LogprobRows:
    """How probable a token of each row was, and which ones were the most probable there."""

    def __init__(self, logits: Tensor, tokens: Tensor, nums: Sequence[int]) -> None:
        """logits [R, V], as the model has them; tokens [R]; nums: of how many of the most probable each row is told."""
        self._nums = nums
        self._on_host = ToHost(*kernels.logprobs.logprobs(logits, tokens, max(nums)))

    def read(self) -> list[Logprobs]:
        """By row. Of a row that is not finite, nothing in it is a number (`is_finite`)."""
        columns = zip(*(it.tolist() for it in self._on_host.read()), strict=True)
        return [
            Logprobs(chosen, rank, ids[:num], top[:num])
            for (chosen, rank, ids, top), num in zip(columns, self._nums, strict=True)
        ]


def is_finite(it: Logprobs) -> bool:
    return not math.isnan(it.chosen)
