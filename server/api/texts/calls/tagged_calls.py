"""Formats that write each argument between tags, without quotes: of which kind it is, the tool's schema says."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from server.api.texts.calls.lark import ANY, Spelling, json_of, one_of, quoted
from server.api.texts.calls.schema_types import is_any_string_or_none, kinds_of, properties_of, says_no_more
from server.api.texts.incoming import Incoming, Steps
from server.api.texts.speech import Tool
from server.api.texts.told import Told

_NAME = re.compile(r"[A-Za-z0-9_.-]*")
_LINE = "\n"
_NONE: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Tagged:
    """`begin`, then functions, then `end`. A function: `function` name `function_then` arguments `function_end`; an
    argument: `key` name `key_then` value `value_end`.

    `line`: what templates write around a function, and behind each argument; `around_value`: a newline that belongs to
    the tags.
    """

    name: str
    begin: str
    function: str
    function_then: str
    key: str
    key_then: str
    value_end: str
    function_end: str
    end: str
    around_value: str = ""

    @property
    def markers(self) -> Sequence[str]:
        texts = (self.begin, self.key, self.key_then, self.value_end, self.function_end, self.end)
        return [it for text in texts for it in text.split() if it.startswith("<") and it.endswith(">")]

    @property
    def trigger(self) -> str:
        return self.begin

    def read(self, text: Incoming, told: Told, tools: Mapping[str, Tool]) -> Steps[None]:
        while (yield from text.upto([self.begin], told.content)):
            text.attempt(self.begin)
            count = 0
            while (yield from self._function(text, told, tools)):
                text.attempt()
                count += 1
                yield from text.space()
                if not self.function:  # nothing shows where another would begin
                    break
            if count and (yield from text.literal(self.end, may_be_cut=True)):
                text.commit()
            told.content(text.as_it_was())

    def _function(self, text: Incoming, told: Told, tools: Mapping[str, Tool]) -> Steps[bool]:
        """Whether one was read; then it is committed to."""
        yield from text.space()
        if not (yield from text.literal(self.function)):
            return False
        name = yield from text.run(_NAME)
        if not name or not (yield from self._is_name_at_end(text)):
            return False
        text.commit()
        told.begin_call(name)
        schema = tools[name].parameters if name in tools else _NONE
        arguments = _Arguments(told, schema)
        while True:
            text.attempt()
            yield from text.space()
            if not (yield from text.literal(self.key)):
                break
            if not (yield from self._argument(text, arguments)):
                return True
        is_closed = yield from text.ahead([self.function_end or self.end])
        if is_closed or not text.has_ended:  # else it is cut off
            arguments.end()
        if (yield from text.literal(self.function_end, may_be_cut=True)):
            text.commit()
        told.content(text.as_it_was().strip())
        return True

    def _is_name_at_end(self, text: Incoming) -> Steps[bool]:
        if self.function_then:
            return (yield from text.literal(self.function_then))
        yield from text.space()
        return bool((yield from text.ahead([self.key, self.end])))

    def _argument(self, text: Incoming, arguments: "_Arguments") -> Steps[bool]:
        """Whether it came to its end."""
        text.commit()
        key: list[str] = []
        first, *others = self.key_then.split()
        if not (yield from text.upto([first], key.append)):
            return False
        for part in others:
            yield from text.space()
            if not (yield from text.literal(part)):
                return False
        value = arguments.begin("".join(key).strip())
        if self.around_value:
            yield from text.literal(self.around_value)
        held = _Held(value, self.around_value)
        if not (yield from text.upto([self.value_end], held.tell)):
            held.tell_rest()
            return False
        arguments.end_value()
        return True

    # -- the grammar ---

    def holds_to(self, tool: Tool) -> bool:
        schema = tool.parameters
        return says_no_more(schema) and all(
            map(partial(is_any_string_or_none, root=schema), properties_of(schema).values())
        )

    def plain(self, spelling: Spelling) -> str:
        return ANY

    def calls(self, tools: Sequence[Tool], most: int, spelling: Spelling, is_begun: bool = False) -> str:
        begin, end = spelling.text(self.begin), spelling.text(self.end)
        lines = '"\\n"' if self.function else ""
        more = f'("\\n" {begin} {lines} call {end}){{0,{most - 1}}}' if most > 1 else ""
        rules = [f"calls: {'' if is_begun else begin} {lines} call {end} {more}"]
        rules.append(one_of("call", [self._lark(index, it, spelling, rules) for index, it in enumerate(tools)]))
        return "\n".join([*rules, spelling.until("any_text", self.value_end)])

    def _lark(self, index: int, tool: Tool, spelling: Spelling, rules: list[str]) -> str:
        """A function, with rules for its arguments."""
        schema, parts = tool.parameters, []
        required = schema.get("required")
        for number, (key, its) in enumerate(properties_of(schema).items()):
            rule = f"value_{index}_{number}"
            rules.append(f"{rule}: {self._value(its, schema, spelling)}")
            behind = spelling.text("\n".join(self.key_then.split()) + self.around_value)
            head = f"{spelling.text(self.key)} {quoted(key)} {behind}"
            is_needed = isinstance(required, list) and key in required
            parts.append(f'({head} {rule} "\\n"){"" if is_needed else "?"}')
        name = f"{spelling.text(self.function)} {quoted(tool.name)} {spelling.text(self.function_then + _LINE)}"
        close = f'{spelling.text(self.function_end)} "\\n"' if self.function_end else ""
        return " ".join([name, *parts, close])

    def _value(self, schema: Any, root: Mapping[str, Any], spelling: Spelling) -> str:
        end = spelling.text(self.around_value + self.value_end)
        its = schema if isinstance(schema, Mapping) else _NONE
        if isinstance(its.get("enum"), list) and all(isinstance(it, str) for it in its["enum"]):
            return f"({' | '.join(map(quoted, its['enum']))}) {end}"
        kinds = kinds_of(schema, root)
        if not kinds or "string" in kinds:
            return "any_text"
        defs = {name: root[name] for name in ("$defs", "definitions") if name in root}
        return f"{json_of({**its, **defs})} {end}"


class _Arguments:
    """An object of JSON, of arguments that come one after another."""

    def __init__(self, told: Told, schema: Mapping[str, Any]) -> None:
        self._told, self._schema = told, schema
        self._count = 0
        self._is_string = False
        self._value: list[str] = []  # of no string
        self._kinds: frozenset[str] = frozenset()

    def begin(self, key: str) -> Callable[[str], None]:
        """Whom to tell its value."""
        self._kinds = kinds_of(properties_of(self._schema).get(key), self._schema) or frozenset({"string"})
        self._is_string, self._value = self._kinds == {"string"}, []
        self._told.arguments(f"{', ' if self._count else '{'}{json.dumps(key, ensure_ascii=False)}: ")
        self._count += 1
        if not self._is_string:
            return self._value.append
        self._told.arguments('"')
        return lambda text: self._told.arguments(json.dumps(text, ensure_ascii=False)[1:-1])

    def end_value(self) -> None:
        self._told.arguments('"' if self._is_string else _typed("".join(self._value), self._kinds))

    def end(self) -> None:
        self._told.arguments("}" if self._count else "{}")


class _Held:
    """Tells a value without the newline that its end tag begins with."""

    def __init__(self, tell: Callable[[str], None], end: str) -> None:
        self._tell, self._end = tell, end
        self._held = ""

    def tell(self, text: str) -> None:
        text = self._held + text
        self._held = self._end if self._end and text.endswith(self._end) else ""
        text = text.removesuffix(self._held) if self._held else text
        if text:
            self._tell(text)

    def tell_rest(self) -> None:
        if self._held:
            self._tell(self._held)


def _typed(text: str, kinds: frozenset[str]) -> str:
    """As JSON. What is none, or of no kind that is allowed, is a string."""
    stripped = text.strip()
    spelled = {"True": "true", "False": "false", "None": "null"}.get(stripped, stripped)
    try:
        value = json.loads(spelled, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    if isinstance(value, str) or ("string" in kinds and not _is_of(value, kinds)):
        return json.dumps(text, ensure_ascii=False)
    return spelled


def _refuse(name: str) -> None:
    raise ValueError(name)


def _is_of(value: Any, kinds: frozenset[str]) -> bool:
    if value is None:
        return "null" in kinds
    if isinstance(value, bool):
        return "boolean" in kinds
    if isinstance(value, int):
        return bool(kinds & {"integer", "number"})
    names = {float: "number", list: "array", dict: "object"}
    return names[type(value)] in kinds


FORMATS = (
    Tagged("qwen3_xml", "<tool_call>", "<function=", ">", "<parameter=", ">", "</parameter>", "</function>",
           "</tool_call>", around_value="\n"),
    Tagged("seed", "<seed:tool_call>", "<function=", ">", "<parameter=", ">", "</parameter>", "</function>",
           "</seed:tool_call>"),
    Tagged("minimax_m2", "<minimax:tool_call>", '<invoke name="', '">', '<parameter name="', '">', "</parameter>",
           "</invoke>", "</minimax:tool_call>"),
    Tagged("glm4", "<tool_call>", "", "", "<arg_key>", "</arg_key> <arg_value>", "</arg_value>", "", "</tool_call>"),
)  # fmt: skip
