"""The model that FakeRunner computes with: everything follows from fingerprints of prefixes.

A prefix's fingerprint is a hash of the adapter's revision and its tokens, and says which token follows, how probable
each would be, and what the hidden state is. So what is right for a request is known without running anything, and what
was computed for another one, or another adapter, shows.
"""

import hashlib
import math
import struct
from collections.abc import Iterator, Sequence

from adapters_store.ref import AdapterRef
from server.engine.masks import Mask
from server.engine.request import Logprobs, OfPrompt, ToldOfPrompt

State = bytes  # 8 bytes
HIDDEN_SIZE = 4
_NUMBERS = struct.Struct(f"<{HIDDEN_SIZE}H")  # of a state
_VECTOR = struct.Struct(f"<{HIDDEN_SIZE}f")


def start(adapter: AdapterRef | None) -> State:
    """Before the first token."""
    return hashlib.blake2b(adapter.revision.encode() if adapter else b"", digest_size=8).digest()


def following(state: State, token: int) -> State:
    return hashlib.blake2b(state + token.to_bytes(8, "little"), digest_size=8).digest()


def next_token(state: State, vocab_size: int) -> int:
    return int.from_bytes(state, "little") % vocab_size


def next_allowed(state: State, vocab_size: int, mask: Mask) -> int:
    """The first token that the mask allows, from that on which the model says next. It allows at least one."""
    bits, first = int.from_bytes(mask, "little"), next_token(state, vocab_size)
    while not bits >> first & 1:
        first = (first + 1) % vocab_size
    return first


def logprobs(state: State, token: int, num: int, vocab_size: int) -> Logprobs:
    """Of a token behind this prefix. The most probable one is that which the model says next, then those behind it by
    id; each is half as probable as the one before, and all of them a little less, by how much being the prefix's own.
    """
    best = next_token(state, vocab_size)
    own = int.from_bytes(state, "little") / 2**64

    def of(rank: int) -> float:
        return -(rank + own) * math.log(2)

    rank = (token - best) % vocab_size + 1
    ranks = range(1, min(num, vocab_size) + 1)
    return Logprobs(of(rank), rank, [(best + it - 1) % vocab_size for it in ranks], [of(it) for it in ranks])


class Seen:
    """What was computed of a prompt so far, from its first token on."""

    def __init__(self) -> None:
        self.logprobs: list[Logprobs] = []
        self._sums = [0] * HIDDEN_SIZE
        self._last = self._sums

    def take(self, state: State, following_token: int | None, num_logprobs: int | None, vocab_size: int) -> None:
        """A prefix of the prompt, longer by a token than the one before, and what follows it there."""
        self._last = list(_NUMBERS.unpack(state))
        self._sums = [total + number for total, number in zip(self._sums, self._last, strict=True)]
        if num_logprobs is not None and following_token is not None:
            self.logprobs.append(logprobs(state, following_token, num_logprobs, vocab_size))

    def told(self, of_prompt: OfPrompt, num_tokens: int) -> ToldOfPrompt:
        vector: bytes | None = None
        if of_prompt.pooling is not None:
            pooled = [it / num_tokens for it in self._sums] if of_prompt.pooling == "mean" else self._last
            vector = _VECTOR.pack(*(it / 2**16 for it in pooled))
        return ToldOfPrompt(self.logprobs if of_prompt.num_logprobs is not None else None, vector)


def _states(adapter: AdapterRef | None, tokens: Sequence[int]) -> Iterator[State]:
    """Of every prefix of `tokens`, from that of one token on."""
    state = start(adapter)
    for token in tokens:
        state = following(state, token)
        yield state


def expected_tokens(adapter: AdapterRef | None, prompt: Sequence[int], count: int, vocab_size: int) -> list[int]:
    """What FakeRunner generates for this prompt, whatever else is in the batch."""
    *_, state = _states(adapter, prompt)
    tokens: list[int] = []
    for _ in range(count):
        tokens.append(next_token(state, vocab_size))
        state = following(state, tokens[-1])
    return tokens


def expected_logprobs(
    adapter: AdapterRef | None, tokens: Sequence[int], first: int, num: int, vocab_size: int
) -> list[Logprobs]:
    """What FakeRunner says of each of the tokens from place `first` (at least 1) on."""
    states = list(_states(adapter, tokens))
    return [logprobs(states[at - 1], tokens[at], num, vocab_size) for at in range(first, len(tokens))]


def expected_of_prompt(
    adapter: AdapterRef | None, prompt: Sequence[int], of_prompt: OfPrompt, vocab_size: int
) -> ToldOfPrompt:
    """What FakeRunner tells of this prompt."""
    seen = Seen()
    for state in _states(adapter, prompt):
        seen.take(state, None, None, vocab_size)
    if of_prompt.num_logprobs is not None:
        seen.logprobs = expected_logprobs(adapter, prompt, 1, of_prompt.num_logprobs, vocab_size)
    return seen.told(of_prompt, len(prompt))
