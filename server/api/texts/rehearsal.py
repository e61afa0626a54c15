"""What a chat template does with tools, found by giving it some: whether it writes them, and in which format calls."""

import json
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import product
from typing import Any

from server.api.texts.calls.format import CallFormat
from server.api.texts.speech import Tool
from server.api.texts.splitting import TextSplitter
from server.errors import InvalidRequest

Message = Mapping[str, Any]
_MOST_SECONDS = 2.0  # of the processor, for all renderings; they take a few milliseconds
_SHORT = re.compile(r"[A-Za-z0-9]{9}")
ID_CHARS = 9  # of a call, as many as Mistral's templates insist on


@dataclass(frozen=True)
class Style:
    """How a template wants earlier turns with calls. `ids_are_names`: it writes a call's id in place of its name, and
    expects it to be functions.NAME:NUMBER. `ids_are_short`: of nine letters or digits, or it refuses them."""

    arguments_are_text: bool = False
    empty_content: str | None = ""
    ids_are_names: bool = False
    ids_are_short: bool = False

    def shaped(self, messages: Sequence[Message]) -> list[Message]:
        """The messages as the template reads them. Their calls have their arguments as objects."""
        ids: dict[str, str] = {}
        return [self._shaped(it, ids) for it in messages]

    def _shaped(self, message: Message, ids: dict[str, str]) -> Message:
        if message.get("tool_call_id") in ids:
            return {**message, "tool_call_id": ids[message["tool_call_id"]]}
        if not message.get("tool_calls"):
            return message
        calls = [self._call(it, ids) for it in message["tool_calls"]]
        return {**message, "content": message.get("content") or self.empty_content, "tool_calls": calls}

    def _call(self, call: Message, ids: dict[str, str]) -> Message:
        function = call["function"]
        if self.ids_are_names:
            ids[call["id"]] = f"functions.{function['name']}:{len(ids)}"
        elif self.ids_are_short and not _SHORT.fullmatch(call["id"]):
            ids[call["id"]] = str(int.from_bytes(sha256(call["id"].encode()).digest()))[-ID_CHARS:]
        if self.arguments_are_text:
            function = {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
        return {**call, "id": ids.get(call["id"], call["id"]), "function": function}


@dataclass(frozen=True)
class ToolUse:
    """`style` None: it writes no calls; `format` None: in none that is known. `takes_several`: calls in one turn."""

    writes_tools: bool
    writes_results: bool
    style: Style | None = None
    format: CallFormat | None = None
    takes_several: bool = False


# messages and tools, and whether an answer is asked for, to text; raises InvalidRequest
Render = Callable[[Sequence[Message], Sequence[Tool], bool, Style], str]


class Rehearsal:
    """Renders conversations in which names and words are such that nobody else writes them."""

    def __init__(self, render: Render, formats: Sequence[CallFormat]) -> None:
        self._render, self._formats = render, formats
        self._deadline = time.thread_time() + _MOST_SECONDS
        self._number = str(secrets.randbelow(9 * 10**9) + 10**9)
        self._names = [f"look_up_{self._number}", f"find_{self._number}"]
        self._words = [f"near {self._number}", f"not {self._number}"]
        self._calls: list[tuple[str, dict[str, object]]] = [
            (self._names[0], {"place": self._words[0], "count": 7}),
            (self._names[1], {"word": self._words[1]}),
        ]
        self._user = {"role": "user", "content": f"Hello {secrets.randbelow(10**9)}."}
        self._tools = [self._tool(name, its) for name, its in self._calls]

    def tool_use(self) -> ToolUse:
        system = {"role": "system", "content": "Be brief."}
        writes = any(self._names[0] in self._rendered(it, Style()) for it in ([self._user], [system, self._user]))
        for style, format in self._ways():
            style = replace(style, ids_are_short=not self._turn(1, style, "call_"))
            results = self._writes_results(style)
            return ToolUse(writes, results, style, format, bool(self._turn(2, style)))
        return ToolUse(writes, False)

    # -- calls ---

    def _ways(self) -> Iterator[tuple[Style, CallFormat | None]]:
        """Styles in which it writes calls: those first of which a format reads back what was written."""
        styles = [Style(*it) for it in product((False, True), ("", None), (False, True))]
        turns = [(it, turn) for it in styles if (turn := self._turn(1, it))]
        for style, turn in turns:
            yield from ((style, it) for it in self._formats if self._is_read(it, turn, style))
        yield from ((style, None) for style, _ in turns)

    def _turn(self, count: int, style: Style, prefix: str = "") -> str:
        """What it writes behind a user's words of a turn with so many calls; empty: not all of them."""
        calls = [self._call(index, name, its, prefix) for index, (name, its) in enumerate(self._calls[:count])]
        turn = {"role": "assistant", "content": "", "tool_calls": calls}
        written = self._behind_user(self._rendered([self._user, turn], style, asks=False))
        is_whole = all(
            name in written and it in written for name, it in zip(self._names[:count], self._words[:count], strict=True)
        )
        return written if is_whole else ""

    def _is_read(self, format: CallFormat, turn: str, style: Style) -> bool:
        """From the beginning of what the model would say of it, if it can be told, or of all."""
        asked = self._behind_user(self._rendered([self._user], style))
        begin = next((at for at, (a, b) in enumerate(zip(asked, turn, strict=False)) if a != b), len(asked))
        return any(self._found(format, text) == self._calls[:1] for text in (turn[begin:], turn))

    def _found(self, format: CallFormat, text: str) -> Sequence[tuple[str, object]]:
        splitter = TextSplitter(None, format, {it.name: it for it in self._tools})
        pieces = [*splitter.push(text).calls, *splitter.flush().calls]
        names = [(it.index, it.name) for it in pieces if it.name is not None]
        with suppress(ValueError):
            return [
                (name, json.loads("".join(it.arguments for it in pieces if it.index == index))) for index, name in names
            ]
        return []

    def _writes_results(self, style: Style) -> bool:
        call = self._call(0, *self._calls[0])
        turn = {"role": "assistant", "content": "", "tool_calls": [call]}
        told = f"It is {secrets.randbelow(10**9)}."
        result = {"role": "tool", "tool_call_id": call["id"], "name": self._names[0], "content": told}
        return told in self._rendered([self._user, turn, result], style)

    # -- rendering ---

    def _rendered(self, messages: Sequence[Message], style: Style, asks: bool = True) -> str:
        for tools in (self._tools, ()):  # some write tools only behind a system message, some fail on them
            if time.thread_time() > self._deadline:
                break
            with suppress(InvalidRequest):
                return self._render(messages, tools, asks, style)
        return ""

    def _behind_user(self, text: str) -> str:
        return text.split(self._user["content"])[-1]

    def _call(self, index: int, name: str, arguments: Mapping[str, object], prefix: str = "") -> dict[str, Any]:
        id = f"{prefix}{self._number[: ID_CHARS - 1]}{index}"
        return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}

    @staticmethod
    def _tool(name: str, arguments: Mapping[str, object]) -> Tool:
        kinds = {key: {"type": "integer" if isinstance(it, int) else "string"} for key, it in arguments.items()}
        return Tool(name, f"Does {name}.", {"type": "object", "properties": kinds, "required": list(kinds)})
