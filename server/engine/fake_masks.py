"""Masks without a grammar's library, for tests and simulation: what is allowed follows from a hash of the grammar's
text and of the tokens so far, and each mask is there after a number of looks."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from random import Random

from adapters_store.ref import AdapterRef
from server.engine.fake_model import following, next_allowed, start
from server.engine.masks import Broken, Made, Mask

TOO_MUCH = "too much after "  # a grammar that begins so breaks behind as many tokens as the number that follows


class FakeMasks:
    """`most_looks`: a mask is late by up to so many calls of `poll` and `collect`; 0: never."""

    def __init__(self, vocab_size: int = 1000, most_looks: int = 0, seed: int = 0) -> None:
        self._vocab_size, self._most_looks, self._rng = vocab_size, most_looks, Random(seed)
        self._grammars: dict[int, str] = {}
        self._tokens: dict[int, list[int]] = {}
        self._looks: dict[int, int] = {}  # that are left until the mask is there
        self._num_made = 0
        self._broken: list[Broken] = []

    def open(self, request_id: int, grammar: str, tokens: Sequence[int]) -> None:
        assert request_id not in self._grammars
        self._grammars[request_id], self._tokens[request_id] = grammar, list(tokens)
        self._begin(request_id)

    def accept(self, request_id: int, token: int) -> None:
        if request_id not in self._grammars:  # it broke, which the next `poll` tells
            return
        assert self.is_ready(request_id) and is_allowed(self._grammars[request_id], self._tokens[request_id], token)
        self._tokens[request_id].append(token)
        self._begin(request_id)

    def close(self, request_id: int) -> None:
        self._broken = [it for it in self._broken if it.request_id != request_id]
        self._let_go(request_id)

    def _let_go(self, request_id: int) -> None:
        for by_request in (self._grammars, self._tokens, self._looks):
            by_request.pop(request_id, None)

    def is_ready(self, request_id: int) -> bool:
        return self._looks.get(request_id) == 0

    def poll(self) -> list[Broken]:
        self._look()
        broken, self._broken = self._broken, []
        return broken

    def collect(
        self, request_ids: Sequence[int], is_computing: Callable[[], bool], may_wait: bool
    ) -> Mapping[int, Mask]:
        self._look()
        return {it: mask(self._grammars[it], self._tokens[it], self._vocab_size)
                for it in request_ids if self.is_ready(it)}  # fmt: skip

    def stop(self) -> None:
        for request_id in tuple(self._grammars):
            self.close(request_id)

    @property
    def made(self) -> Made:
        return Made(self._num_made)

    def num_open(self) -> int:
        return len(self._grammars)

    def _begin(self, request_id: int) -> None:
        self._num_made += 1
        self._looks[request_id] = self._rng.randint(0, self._most_looks)

    def _look(self) -> None:
        """Some break, whoever looks: who is told of it is who polls."""
        self._looks = {it: max(0, looks - 1) for it, looks in self._looks.items()}
        for it, grammar in tuple(self._grammars.items()):
            if grammar.startswith(TOO_MUCH) and len(self._tokens[it]) >= int(grammar.removeprefix(TOO_MUCH)):
                self._broken.append(Broken(it, "the grammar is too much", is_its_own=True))
                self._let_go(it)


def is_allowed(grammar: str, tokens: Sequence[int], token: int) -> bool:
    """Whether the token may come behind these. About half of them may."""
    said = f"{grammar}|{','.join(map(str, tokens))}|{token}"
    return hashlib.blake2b(said.encode(), digest_size=1).digest()[0] < 128


def mask(grammar: str, tokens: Sequence[int], vocab_size: int) -> Mask:
    bits = sum(1 << token for token in range(vocab_size) if is_allowed(grammar, tokens, token))
    return memoryview(bits.to_bytes(-(-vocab_size // 32) * 4, "little"))


def expected_under(
    grammar: str, adapter: AdapterRef | None, prompt: Sequence[int], count: int, vocab_size: int
) -> list[int]:
    """What FakeRunner generates for this prompt under this grammar, whenever its masks come."""
    state = start(adapter)
    for token in prompt:
        state = following(state, token)
    tokens: list[int] = []
    for _ in range(count):
        token = next_allowed(state, vocab_size, mask(grammar, tokens, vocab_size))
        tokens.append(token)
        state = following(state, token)
    return tokens
