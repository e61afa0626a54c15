"""What a format of calls is."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from server.api.texts.calls.lark import Spelling
from server.api.texts.incoming import Incoming, Steps
from server.api.texts.speech import Tool
from server.api.texts.told import Told


class CallFormat(Protocol):
    """How the models of some families write calls.

    `markers`: what a tokenizer may have tokens for. `trigger`: the one that begins calls wherever it comes in a text;
    empty: an answer either is calls or has none.
    """

    @property
    def name(self) -> str:
        """What manifests and command lines call it."""

    @property
    def markers(self) -> Sequence[str]: ...

    @property
    def trigger(self) -> str: ...

    def read(self, text: Incoming, told: Told, tools: Mapping[str, Tool]) -> Steps[None]:
        """An answer, from where its content may begin to its end: calls, and what is none as content, unchanged."""

    def holds_to(self, tool: Tool) -> bool:
        """Whether the grammar lets no arguments come that the tool's schema forbids."""

    def plain(self, spelling: Spelling) -> str:
        """An expression for any answer without calls."""

    def calls(self, tools: Sequence[Tool], most: int, spelling: Spelling, is_begun: bool = False) -> str:
        """The grammar of one to `most` calls of these tools and nothing else, in Lark, with a rule `calls`. is_begun:
        the trigger is there already."""
