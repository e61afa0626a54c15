"""One completion as it grows: from the engine's tokens to pieces of text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from server.api.texts.decoding import Decoder, StopMatcher, StopStrings
from server.engine.messages import TokenEvent
from server.engine.request import FinishReason, Logprobs, ToldOfPrompt


class TokenTold(NamedTuple):
    """A generated token of which log-probabilities were asked. `offset`: characters of the answer before it.

    `ends`: it ended the answer, and has no text there.
    """

    id: int
    logprobs: Logprobs
    offset: int
    ends: bool = False


@dataclass(frozen=True)
class Piece:
    """Some text of one choice, and the tokens that it is made of, where they were asked about.

    `finish` comes with the last one, and `stop` too: the stop string that ended it, or the stop token of the request's
    own. `of_prompt` comes with the first, if it was asked for. `begins`: it is the first, and comes with the first
    token, even if that has no text yet (a part of a character, what may be a stop string).
    """

    index: int
    text: str
    tokens: Sequence[TokenTold] = ()
    finish: str | None = None
    stop: str | int | None = None
    of_prompt: ToldOfPrompt | None = None
    begins: bool = False

    @property
    def says_something(self) -> bool:
        return bool(self.text or self.finish or self.of_prompt or self.begins)


class Choice:
    def __init__(
        self,
        index: int,
        decoder: Decoder,
        stops: StopStrings,
        own_stops: frozenset[int] = frozenset(),
        min_tokens: int = 0,
    ) -> None:
        """own_stops: token ids that the request itself named. min_tokens: of which no stop string is looked for."""
        self.index = index
        self._decoder, self._matcher, self._own_stops = decoder, StopMatcher(stops), own_stops
        self._num_unstoppable = min_tokens
        self._num_decoded = 0  # characters
        self._num_released = 0
        self._held: list[TokenTold] = []  # those whose text is not released yet
        self._has_begun = False

    def push(self, event: TokenEvent) -> Piece:
        """The text that this token completes. A stop token has none."""
        token, ends = event.token, event.finish is FinishReason.STOP
        if token is not None and token.logprobs is not None:
            self._held.append(TokenTold(token.id, token.logprobs, self._num_decoded, ends))
        text = "" if token is None or ends else self._stoppable(self._decoder.push(token.id), is_token=True)
        if event.finish is not None and self._matcher.matched is None:
            text += self._stoppable(self._decoder.flush())
        if self._matcher.matched is not None:
            return self._piece(text, event, FinishReason.STOP.value, self._matcher.matched)
        if event.finish is None:
            return self._piece(text, event)
        stop = token.id if token is not None and ends and token.id in self._own_stops else None
        return self._piece(text + self._matcher.flush(), event, event.finish.value, stop)

    def _stoppable(self, text: str, is_token: bool = False) -> str:
        """What may be released of it."""
        self._num_decoded += len(text)
        if self._num_unstoppable:
            self._num_unstoppable -= is_token
            return text
        return self._matcher.push(text)

    def _piece(self, text: str, event: TokenEvent, finish: str | None = None, stop: str | int | None = None) -> Piece:
        self._num_released += len(text)
        tokens: Sequence[TokenTold] = ()
        if self._held and (text or finish):
            tokens, self._held = self._held, []
            if self._matcher.matched is not None:  # those behind the cut are not in the answer
                tokens = [it for it in tokens if it.offset < self._num_released]
        begins, self._has_begun = not self._has_begun, True
        return Piece(self.index, text, tokens, finish, stop, event.of_prompt, begins)
