"""What a request adds to its logits before a token is chosen: bias, its grammar's mask, bans of stop tokens, penalties.

What each does, and in which order, is in kernels/sampling/edits. What is no token is left out: an id beyond the row
would be in another request's.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from kernels.sampling import Edits
from server.engine.masks import Mask
from server.engine.request import Request
from server.model.copies import to_device

Numbers = numpy.ndarray[Any, Any]
_NONE = numpy.empty(0, numpy.int32)


class FedBack(NamedTuple):
    """Tokens that only the device knows: request i's last one is token_ids[rows[i]], or known where that is -1."""

    rows: Numbers  # [R]
    token_ids: Tensor


def has_place(request: Request) -> bool:
    """Whether its next token is chosen with more than a mask."""
    it = request.sampling
    return bool(it.bias) or _is_penalised(request) or _bans_stops(request)


def may_have_place(request: Request) -> bool:
    """Whether any of its tokens is."""
    return has_place(request) or (request.sampling.min_tokens > 0 and bool(request.stop_token_ids))


def _is_penalised(request: Request) -> bool:
    it = request.sampling
    return bool(it.presence or it.frequency) or it.repetition != 1


def _bans_stops(request: Request) -> bool:
    generated = request.num_generated + request.num_awaited
    return generated < request.sampling.min_tokens and bool(request.stop_token_ids)


def edits_of(
    requests: Sequence[Request],
    masks: Mapping[int, Mask],
    vocab: int,
    device: torch.device,
    fed_back: FedBack | None = None,
) -> Edits | None:
    """A row for each request; masks by request. None if nobody has any. All lists travel as one tensor. fed_back: None
    where all tokens are known."""
    masked = [row for row, it in enumerate(requests) if it.id in masks]
    placed = [row for row, it in enumerate(requests) if has_place(it)]
    if not masked and not placed:
        return None
    its = [requests[row] for row in placed]
    biases = [_bias(it.sampling.bias, vocab) for it in its]
    histories = [_history(it) if _is_penalised(it) else _NONE for it in its]
    samplings = [it.sampling for it in its]
    columns = [
        _numbered(masked, len(requests)),
        _numbered(placed, len(requests)),
        *_as_lists([tokens for tokens, _ in biases]),
        _as_bits(numpy.concatenate([_NONE.view(numpy.float32), *(values for _, values in biases)])),
        *_as_lists([_bans(it, vocab) for it in its]),
        *_as_lists(histories),
        numpy.array([it.first.prompt_len for it in its], numpy.int32),
        _as_bits([it.presence for it in samplings]),
        _as_bits([it.frequency for it in samplings]),
        _as_bits([it.repetition for it in samplings]),
    ]
    parts = to_device(numpy.concatenate(columns), torch.int32, device).split([len(it) for it in columns])
    edits = Edits(_bits([masks[requests[row].id] for row in masked], device), *_typed(parts))
    if fed_back is not None:
        _feed(edits.history, histories, [int(fed_back.rows[row]) for row in placed], fed_back.token_ids)
    return edits


def _history(request: Request) -> Numbers:
    """Its tokens, with 0 in the place of one that is not known."""
    known = numpy.frombuffer(request.first.history, numpy.int32)
    return numpy.append(known, numpy.zeros(request.num_awaited, numpy.int32))


def _feed(history: Tensor, histories: Sequence[Numbers], rows: Sequence[int], token_ids: Tensor) -> None:
    """Put the tokens in place that only the device knows: each is the last of its history."""
    ends = accumulate(map(len, histories))
    fed = [(end - 1, row) for end, it, row in zip(ends, histories, rows, strict=True) if len(it) and row >= 0]
    if fed:
        places, sources = to_device(list(zip(*fed, strict=True)), torch.int64, history.device)
        history.index_copy_(0, places, token_ids.index_select(0, sources).int())


def _typed(parts: Iterable[Tensor]) -> Iterator[Tensor]:
    for name, part in zip(Edits._fields[1:], parts, strict=True):
        yield part.view(torch.float32) if name in ("biases", "presence", "frequency", "repetition") else part


def _numbered(rows: Sequence[int], count: int) -> Numbers:
    numbers = numpy.full(count, -1, numpy.int32)
    numbers[rows] = range(len(rows))
    return numbers


def _as_lists(parts: Sequence[Numbers]) -> tuple[Numbers, Numbers]:
    """(starts, all of them)."""
    return numpy.array([0, *accumulate(map(len, parts))], numpy.int32), numpy.concatenate([_NONE, *parts])


def _as_bits(values: Sequence[float] | Numbers) -> Numbers:
    """float32, among integers."""
    with numpy.errstate(over="ignore"):  # what is infinite then makes its row so
        return numpy.array(values, numpy.float32).view(numpy.int32)


def _bits(masks: Sequence[Mask], device: torch.device) -> Tensor:
    """[masks, words] int32, as they come."""
    words = [numpy.frombuffer(it, numpy.int32) for it in masks]
    return to_device(numpy.stack(words) if words else numpy.empty((0, 0), numpy.int32), torch.int32, device)


def _bias(bias: Mapping[int, float], vocab: int) -> tuple[Numbers, Numbers]:
    tokens = numpy.fromiter(bias.keys(), numpy.int64, len(bias))
    values = numpy.fromiter(bias.values(), numpy.float64, len(bias))
    known = (tokens >= 0) & (tokens < vocab)
    return tokens[known].astype(numpy.int32), values[known]


def _bans(request: Request, vocab: int) -> Numbers:
    if not _bans_stops(request):
        return _NONE
    return numpy.array([token for token in request.stop_token_ids if 0 <= token < vocab], numpy.int32)
