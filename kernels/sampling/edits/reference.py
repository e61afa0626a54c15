"""Reference and CPU path of edits, in this order:

1. Bias is added.
2. A token that the mask does not allow gets minus infinity added.
3. So does a token that is banned, unless nothing would be left to choose from: then the row's ban is lifted.
4. Penalties as vLLM and OpenAI define them. A token of the prompt or the output: its logit is divided by `repetition`
   where positive, else multiplied. A token of the output, there c times: minus `frequency` * c, minus `presence`.

All are added, so what is not finite stays so.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor


class Edits(NamedTuple):
    """Of some of the rows of [R, V] logits; the example is in __init__.py.

    masks [n, words] int32: a bit for each token, the lowest first; 1: it may come. mask_rows [R] int32: which of them
    is a row's, or -1. places [R] int32: a number of its own, from 0 on, for each row that has anything else, or -1.

    By place p of P: what belongs to it lies at [starts[p], starts[p + 1]) of one list for all, starts [P + 1] int32.
    bias_tokens int32 and biases float32; bans int32: each of these tokens once in a row, within the vocabulary. history
    int32: the row's tokens, of which the first prompt_lens[p] (int32) are the prompt. presence, frequency (0 is off),
    repetition (1 is off): [P] float32.
    """

    masks: Tensor
    mask_rows: Tensor
    places: Tensor
    bias_starts: Tensor
    bias_tokens: Tensor
    biases: Tensor
    ban_starts: Tensor
    bans: Tensor
    history_starts: Tensor
    history: Tensor
    prompt_lens: Tensor
    presence: Tensor
    frequency: Tensor
    repetition: Tensor

    @property
    def num_places(self) -> int:
        return len(self.prompt_lens)


def edited(logits: Tensor, edits: Edits, rows: Tensor) -> Tensor:
    """logits [n, V] float32: those of `rows` [n] int64, in which all places are; they may be overwritten."""
    masks = edits.mask_rows[rows]
    masked = (masks >= 0).nonzero()[:, 0]
    places = edits.places[rows]
    owner = torch.zeros(edits.num_places, dtype=torch.int64)  # the row of each place
    placed = (places >= 0).nonzero()[:, 0]
    owner[places[placed].long()] = placed
    if len(edits.biases):
        _add(logits, owner, edits.bias_starts, edits.bias_tokens, edits.biases)
    if len(masked):
        logits.index_add_(0, masked, _forbidding(edits.masks[masks[masked].long()], logits.shape[1]))
    if len(edits.bans):
        left = logits.clone()
        _add(left, owner, edits.ban_starts, edits.bans, torch.full(edits.bans.shape, -math.inf))
        is_left = left.amax(-1, keepdim=True) > -math.inf
        logits = torch.where(is_left, left, logits)
    if len(edits.history):
        _penalise(logits, edits, owner.tolist())
    return logits


def _add(logits: Tensor, owner: Tensor, starts: Tensor, tokens: Tensor, values: Tensor) -> None:
    rows = owner.repeat_interleave(starts.diff())
    logits.view(-1).index_add_(0, rows * logits.shape[1] + tokens, values)


def _forbidding(masks: Tensor, vocab: int) -> Tensor:
    """[n, V] float32: 0 where a token may come, else minus infinity."""
    assert masks.shape[1] * 32 >= vocab
    spread = torch.nn.functional.embedding(masks.view(torch.uint8).int(), _table())
    return spread.flatten(1)[:, :vocab]


@functools.cache
def _table() -> Tensor:
    """What each pattern of eight bits stands for, the lowest first."""
    is_allowed = (torch.arange(1 << 8).unsqueeze(1) >> torch.arange(8)) & 1
    return torch.zeros(is_allowed.shape).masked_fill_(is_allowed == 0, -math.inf)


def _penalise(logits: Tensor, edits: Edits, owner: list[int]) -> None:
    starts, prompt_lens = edits.history_starts.tolist(), edits.prompt_lens.tolist()
    for place, prompt_len in enumerate(prompt_lens):
        history, values = edits.history[starts[place] : starts[place + 1]].long(), logits[owner[place]]
        seen, (told, count) = history.unique(), history[prompt_len:].unique(return_counts=True)
        repetition = edits.repetition[place]
        values[seen] = torch.where(values[seen] > 0, values[seen] / repetition, values[seen] * repetition)
        values[told] -= edits.frequency[place] * count
        values[told] -= edits.presence[place]
