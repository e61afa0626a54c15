"""What a request adds to its logits before a token is chosen: bias, its grammar's mask, bans of stop tokens, penalties.

Rows that have none of this never come here. In order: bias, then mask, then bans, then penalties (kernels/sampling).
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy
import torch
from torch import Tensor

from kernels.sampling import Penalties
from server.engine.masks import Mask
from server.engine.request import Request
from server.model.copies import to_device

_BITS = 16  # of a mask, that are looked up together
Numbers = numpy.ndarray[Any, Any]


def is_edited(request: Request) -> bool:
    it = request.sampling
    return bool(it.bias) or _is_penalised(request) or _bans_stops(request)


def _is_penalised(request: Request) -> bool:
    it = request.sampling
    return bool(it.presence or it.frequency) or it.repetition != 1


def _bans_stops(request: Request) -> bool:
    return request.num_generated < request.sampling.min_tokens and bool(request.stop_token_ids)


def edited(logits: Tensor, requests: Sequence[Request], masks: Sequence[Mask | None] = ()) -> Tensor:
    """With bias, masks (one for each request, if any has one) and bans. logits [R, V] float32, a row for each request;
    they may be overwritten. What is no token is left out: an id beyond the row would be in another request's.

    All are added, so that what is not finite stays so and the request fails. A ban that leaves nothing to choose from
    is lifted: the request ends sooner than it wanted, which is better than a token that has no probability.
    """
    vocab, flat = logits.shape[1], logits.view(-1)
    biases = [_bias(row, it.sampling.bias, vocab) for row, it in enumerate(requests) if it.sampling.bias]
    if biases:
        places, values = (numpy.concatenate(column) for column in zip(*biases, strict=True))
        _add(flat, places, values)
    masked = [row for row, mask in enumerate(masks) if mask is not None]
    if masked:
        logits.index_add_(
            0,
            to_device(masked, torch.int64, logits.device),
            _forbidding([mask for mask in masks if mask is not None], vocab, logits.device),
        )
    banned = [row * vocab + token for row, token in _bans(requests) if 0 <= token < vocab]
    if banned:
        left = logits.clone()
        _add(left.view(-1), banned, [-math.inf] * len(banned))
        is_left = left.amax(-1, keepdim=True) > -math.inf
        return torch.where(is_left, left, logits)
    return logits


def _forbidding(masks: Sequence[Mask], vocab: int, device: torch.device) -> Tensor:
    """[masks, V] float32: 0 where a token may come, else minus infinity. Bits travel, sixteen at a time, and are spread
    out where the logits are."""
    bits = numpy.stack([numpy.frombuffer(it, "<u2") for it in masks])
    assert bits.shape[1] * _BITS >= vocab
    spread = torch.nn.functional.embedding(to_device(bits.astype(numpy.int32), torch.int32, device), _table(device))
    return spread.flatten(1)[:, :vocab]


@functools.cache
def _table(device: torch.device) -> Tensor:
    """What each pattern of sixteen bits stands for, the lowest first: 4 MiB."""
    patterns = torch.arange(1 << _BITS, device=device).unsqueeze(1)
    is_allowed = (patterns >> torch.arange(_BITS, device=device)) & 1
    return torch.zeros(is_allowed.shape, device=device).masked_fill_(is_allowed == 0, -math.inf)


def _add(flat: Tensor, places: Sequence[int] | Numbers, values: Sequence[float] | Numbers) -> None:
    flat.index_add_(0, to_device(places, torch.int64, flat.device), to_device(values, torch.float32, flat.device))


def _bias(row: int, bias: Mapping[int, float], vocab: int) -> tuple[Numbers, Numbers]:
    """Places in the flat logits, and what is added there."""
    tokens = numpy.fromiter(bias.keys(), numpy.int64, len(bias))
    values = numpy.fromiter(bias.values(), numpy.float64, len(bias))
    known = (tokens >= 0) & (tokens < vocab)
    return row * vocab + tokens[known], values[known]


def _bans(requests: Sequence[Request]) -> Iterator[tuple[int, int]]:
    for row, request in enumerate(requests):
        if _bans_stops(request):
            for token in request.stop_token_ids:
                yield row, token


def penalties(requests: Sequence[Request], device: torch.device) -> Penalties | None:
    """Over what the first lane of each has seen: its prompt and what was generated. None if none has any."""
    penalised = [_is_penalised(it) for it in requests]
    if not any(penalised):
        return None
    samplings = [it.sampling for it in requests]
    presence, frequency, repetition = to_device(
        [[it.presence for it in samplings], [it.frequency for it in samplings], [it.repetition for it in samplings]],
        torch.float32,
        device,
    )
    histories = [
        numpy.frombuffer(it.first.history, numpy.int32) if is_so else numpy.empty(0, numpy.int32)
        for it, is_so in zip(requests, penalised, strict=True)
    ]
    return Penalties(
        presence,
        frequency,
        repetition,
        to_device(numpy.concatenate(histories), torch.int32, device),
        to_device([0, *accumulate(map(len, histories))], torch.int32, device),
        to_device([it.first.prompt_len if is_so else 0 for it, is_so in zip(requests, penalised, strict=True)],
                  torch.int32, device),
    )  # fmt: skip
