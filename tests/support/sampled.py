"""Tokens for a batch of requests, as one step chooses them."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from server.engine.masks import Mask
from server.engine.request import Request
from server.model.inputs import integers
from server.model.sampler import SampledRows, Sampler

_NO_MASKS: Mapping[int, Mask] = {}


def sample(logits: Tensor, requests: Sequence[Request], masks: Mapping[int, Mask] = _NO_MASKS) -> SampledRows:
    """logits [R, V]: a row for each request, as the model has them."""
    sampler = Sampler(requests)
    lengths = integers([len(it.first.tokens) for it in requests])
    return sampler.sample(logits, sampler.draws(lengths), masks)[1]
