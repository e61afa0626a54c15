"""Splitters: what the text of an answer is, piece by piece."""

from collections.abc import Mapping

from server.api.texts.calls.format import CallFormat
from server.api.texts.incoming import Incoming, Steps
from server.api.texts.reasoning import Reasoning
from server.api.texts.speech import Said, Tool
from server.api.texts.told import Told


class PlainSplitter:
    """Of answers that are content and nothing else."""

    is_reasoning = False
    num_calls = 0

    def push(self, text: str) -> Said:
        return Said(text)

    def flush(self) -> Said:
        return Said()


class TextSplitter:
    """Reads reasoning first, where there is a format for it, and then content with calls, where they are looked for."""

    def __init__(
        self,
        reasoning: Reasoning | None,
        calls: CallFormat | None,
        tools: Mapping[str, Tool],
        is_open: bool = False,
    ) -> None:
        """is_open: the prompt ends in the midst of reasoning."""
        self._incoming, self._told = Incoming(), Told(calls is not None)
        self._told.is_reasoning = is_open
        self._is_plain = False
        content = self._plainly() if calls is None else calls.read(self._incoming, self._told, tools)
        self._steps = content if reasoning is None else reasoning.read(self._incoming, self._told, is_open, content)
        next(self._steps, None)

    @property
    def is_reasoning(self) -> bool:
        return self._told.is_reasoning

    @property
    def num_calls(self) -> int:
        return self._told.num_calls

    def push(self, text: str) -> Said:
        if self._is_plain:
            return Said(text)
        self._incoming.add(text)
        next(self._steps, None)
        return self._told.take()

    def flush(self) -> Said:
        self._incoming.end()
        next(self._steps, None)
        self._told.end()
        return self._told.take()

    def _plainly(self) -> Steps[None]:
        """All is content from here on."""
        self._told.content(self._incoming.rest())
        self._is_plain = True
        yield from ()
