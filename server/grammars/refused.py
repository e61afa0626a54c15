"""Why a grammar is not served."""

import json
from typing import Any, Literal

Code = Literal["invalid_grammar", "unsupported_grammar"]
_MOST_SHOWN = 60  # characters of what a client sent


class GrammarRefused(Exception):
    """`message` is for the client: what is wrong, with the numbers, and what would help. `code`: whether the grammar is
    wrong, or means something that is not served. `is_of_tools`: of what stands there for the tools."""

    def __init__(self, message: str, code: Code = "unsupported_grammar", is_of_tools: bool = False) -> None:
        super().__init__(message)
        self.message, self.code, self.is_of_tools = message, code, is_of_tools

    def at(self, place: str) -> "GrammarRefused":
        return GrammarRefused(f"{self.message} (at {shown(place)})", self.code)

    def of_tool(self, schema: Any) -> "GrammarRefused":
        text = json.dumps(schema, ensure_ascii=False)
        return GrammarRefused(f"{self.message}; it is the schema of a tool: {shown(text)}", self.code, is_of_tools=True)


def shown(text: str) -> str:
    """Somebody's words in a message: short, and with nothing in it that does not print."""
    safe = "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text[: _MOST_SHOWN + 1]
    )
    return safe if len(safe) <= _MOST_SHOWN else safe[: _MOST_SHOWN - 1] + "…"
