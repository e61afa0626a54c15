"""What no request may ask for. The front refuses more than this, and the engine relies on none of it: whatever
messages.py can express is served, or ends here as the error of one request.
"""

import math
from collections.abc import Iterator

from server.engine.messages import AddRequest
from server.engine.request import LEAST_WEIGHT, MOST_WEIGHT, OfPrompt, Sampling

MOST_LOGPROBS = 1000  # in one place: each is a number that the loop, which everybody waits for, puts into a message


def problem_of(it: AddRequest, vocab_size: int) -> str | None:
    """Why the request cannot be served at all, if so."""
    has_prompts = bool(it.lanes) and all(lane.prompt for lane in it.lanes)
    if not has_prompts or it.max_tokens < 0 or not LEAST_WEIGHT <= it.weight <= MOST_WEIGHT:
        return (
            "a request has lanes, each with a prompt, max_tokens from 0 on, and a weight from "
            f"{LEAST_WEIGHT} to {MOST_WEIGHT}"
        )
    for lane in it.lanes:
        for token in (min(lane.prompt), max(lane.prompt)):
            if not 0 <= token < vocab_size:
                return f"token {token} in a prompt; the model knows 0 to {vocab_size - 1}"
    problems = [
        *_of_sampling(it.sampling, it.max_tokens, vocab_size), *_of_what_is_told(it.of_prompt, it.max_tokens),
    ]  # fmt: skip
    return next(iter(problems), None)


def _of_sampling(it: Sampling, max_tokens: int, vocab_size: int) -> Iterator[str]:
    for name in ("temperature", "top_p", "min_p", "presence", "frequency", "repetition"):
        value = getattr(it, name)
        if not math.isfinite(value):
            yield f"{name} is {value}, which is no number to count with"
    if it.temperature < 0:
        yield f"temperature is {it.temperature}; it is at least 0"
    if it.repetition <= 0:
        yield f"the repetition penalty is {it.repetition}; it is more than 0"
    for token, value in it.bias.items():
        if not math.isfinite(value):
            yield f"the bias of token {token} is {value}, which is no number to count with"
        if not 0 <= token < vocab_size:
            yield f"a bias of token {token}; the model knows 0 to {vocab_size - 1}"
    if it.min_tokens > max_tokens:
        yield f"min_tokens ({it.min_tokens}) is more than max_tokens ({max_tokens})"
    if it.num_logprobs is not None and not 0 <= it.num_logprobs <= MOST_LOGPROBS:
        yield f"log-probabilities of {it.num_logprobs} tokens; they are told of 0 to {MOST_LOGPROBS}"


def _of_what_is_told(it: OfPrompt | None, max_tokens: int) -> Iterator[str]:
    if it is None:
        return
    if it.num_logprobs is not None and not 0 <= it.num_logprobs <= MOST_LOGPROBS:
        yield (
            f"log-probabilities of {it.num_logprobs} tokens in each place of the prompt; they are told of 0 to "
            f"{MOST_LOGPROBS}"
        )
    if it.pooling is not None and max_tokens > 0:
        yield f"a request whose hidden states are pooled generates nothing; max_tokens is {max_tokens}, not 0"
