"""One completion as it grows: from the engine's tokens to pieces of text."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from server.api.texts.decoding import Decoder, StopMatcher, StopStrings
from server.api.texts.speech import Said, Splitter
from server.engine.messages import TokenEvent
from server.engine.request import FinishReason, Logprobs, ToldOfPrompt

CALLED = "tool_calls"  # why an answer ends that ends by itself and calls tools
_NOTHING = Said()


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
    token, even if that has no text yet (a part of a character, what may be a stop string). `said`: in a conversation,
    what its text and such as was held before it turned out to be; `num_reasoning`: tokens of reasoning that came.
    `says_something`: without it nobody would miss anything.
    """

    index: int
    text: str
    tokens: Sequence[TokenTold] = ()
    finish: str | None = None
    stop: str | int | None = None
    of_prompt: ToldOfPrompt | None = None
    begins: bool = False
    said: Said = _NOTHING
    num_reasoning: int = 0
    says_something: bool = True


class Choice:
    def __init__(
        self,
        index: int,
        decoder: Decoder,
        stops: StopStrings,
        own_stops: frozenset[int] = frozenset(),
        min_tokens: int = 0,
        splitter: Splitter | None = None,
    ) -> None:
        """own_stops: token ids that the request itself named. min_tokens: of which no stop string is looked for.
        splitter: tells what the text is; None: nobody asks."""
        self.index = index
        self._splitter = splitter
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
        said, num_reasoning, is_told = _NOTHING, 0, bool(text)
        if self._splitter is not None:
            num_reasoning = int(event.token is not None and self._splitter.is_reasoning)
            said = self._splitter.push(text)
            if finish is not None:
                said = _joined(said, self._splitter.flush())
                if finish == FinishReason.STOP and stop is None and self._splitter.num_calls:
                    finish = CALLED  # by itself: a stop string may have cut a call
            is_told = bool(said)
        begins, self._has_begun = not self._has_begun, True
        is_told = is_told or finish is not None
        tokens: Sequence[TokenTold] = ()
        if self._held and is_told:
            tokens, self._held = self._held, []
            if self._matcher.matched is not None:  # those behind the cut are not in the answer
                tokens = [it for it in tokens if it.offset < self._num_released]
        says = is_told or begins or event.of_prompt is not None
        return Piece(self.index, text, tokens, finish, stop, event.of_prompt, begins, said, num_reasoning, says)


def _joined(one: Said, other: Said) -> Said:
    """What is said, and what is said behind it; of each call one piece."""
    calls, more = list(one.calls), list(other.calls)
    if calls and more and calls[-1].index == more[0].index:
        calls[-1] = replace(calls[-1], arguments=calls[-1].arguments + more.pop(0).arguments)
    return Said(one.content + other.content, one.reasoning + other.reasoning, calls + more)
