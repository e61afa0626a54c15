"""What a request asked of its prompt: log-probabilities of its tokens, or its hidden states pooled.

A prompt comes in chunks, and each step has one. What was computed so far is carried by the lane from step to step, and
told with the step that comes to the prompt's end.
"""

import torch
from torch import Tensor

from server.engine.plan import Plan, Scheduled
from server.engine.request import Lane, Logprobs, Pooling, ToldOfPrompt
from server.model.copies import ToHost, to_device
from server.model.logprobs import LogprobRows, is_finite


class NotFinite(ArithmeticError):
    """What the model made of the prompt is not."""


class Carried:
    """Of a prompt, from its first token on."""

    def __init__(self) -> None:
        self.logprobs: list[Logprobs] = []
        self.hidden: Tensor | None = None  # [H] float32: hidden states summed


class PromptChunk:
    """What a step computes of one prompt."""

    def __init__(self, scheduled: Scheduled, logits: Tensor, hidden: Tensor | None) -> None:
        """logits [wanted positions, V]; hidden [tokens, H], if anything in the step is pooled."""
        lane, of_prompt = scheduled.lane, scheduled.of_prompt
        assert of_prompt is not None
        if scheduled.start == 0 or not isinstance(lane.carried, Carried):
            lane.carried = Carried()
        self._carried, self._ends = lane.carried, scheduled.samples
        self._logprobs = _logprobs(scheduled, logits, of_prompt.num_logprobs)
        self._tells_logprobs = of_prompt.num_logprobs is not None
        self._vector: ToHost | None = None
        if of_prompt.pooling is not None:
            assert hidden is not None
            self._pool(scheduled, hidden, of_prompt.pooling)
        if self._ends:
            lane.carried = None

    def _pool(self, scheduled: Scheduled, hidden: Tensor, pooling: Pooling) -> None:
        it = self._carried
        if pooling == "mean":
            total = hidden.sum(0, dtype=torch.float32)
            it.hidden = total if it.hidden is None else it.hidden + total
        if self._ends:
            self._vector = ToHost(hidden[-1].float() if it.hidden is None else it.hidden / scheduled.lane.prompt_len)

    def read(self) -> ToldOfPrompt | None:
        """Called once, in the order of steps. With the last chunk: what is to be told. Raises NotFinite."""
        if self._logprobs is not None:
            # at once and not at the end, where a long prompt's would keep others waiting
            self._carried.logprobs += self._logprobs.read()
        if not self._ends:
            return None
        if not all(map(is_finite, self._carried.logprobs)):
            raise NotFinite
        logprobs = self._carried.logprobs if self._tells_logprobs else None
        return ToldOfPrompt(logprobs, None if self._vector is None else _as_bytes(self._vector))


def prompt_chunks(plan: Plan, logits: Tensor, hidden: Tensor | None) -> dict[Lane, PromptChunk]:
    """Of the prompts in a step of which something is to be told. plan: in the order in which it was laid out."""
    chunks: dict[Lane, PromptChunk] = {}
    row = token = 0
    for it in plan:
        next_row, next_token = row + len(it.logit_positions), token + it.num_tokens
        if it.of_prompt is not None:
            own = None if hidden is None else hidden[token:next_token]
            chunks[it.lane] = PromptChunk(it, logits[row:next_row], own)
        row, token = next_row, next_token
    return chunks


def _logprobs(scheduled: Scheduled, logits: Tensor, num: int | None) -> LogprobRows | None:
    """Of the tokens that follow the chunk's own, as far as the prompt goes."""
    lane = scheduled.lane
    following = lane.tokens[scheduled.start + 1 : min(scheduled.start + scheduled.num_tokens + 1, lane.prompt_len)]
    if num is None or not following:
        return None
    tokens = to_device(following, torch.int64, logits.device)
    return LogprobRows(logits[: len(following)], tokens, [num] * len(following))


def _as_bytes(vector: ToHost) -> bytes:
    """float32, little-endian. Raises NotFinite."""
    (pooled,) = vector.read()
    if not bool(pooled.isfinite().all()):
        raise NotFinite
    return bytes(pooled.numpy().astype("<f4").tobytes())
