"""A conversation to the text that the model was trained to read, and to tokens."""

import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from jinja2 import Template, TemplateError, meta
from tokenizers import Tokenizer

from server.api.texts.calls.listed import CALL_FORMATS
from server.api.texts.control_tokens import ControlTokens, Twin
from server.api.texts.open_turn import OpenTurn
from server.api.texts.reasoning import reasoning_of
from server.api.texts.rehearsal import Rehearsal, Style, ToolUse
from server.api.texts.speech import Tool
from server.api.texts.template_sandbox import Sandbox
from server.api.texts.thinking import switched
from server.errors import InvalidRequest

_WORDS = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Conversation:
    """Messages and tools, and what else the template is told.

    A message has a role, `content`, and what its role may have: an assistant's `reasoning_content` and `tool_calls`
    (each an `id` and a `function` with `name` and `arguments`, an object), a tool's `tool_call_id` and `name`.
    `asks_for_answer`: what is rendered ends where the model's answer begins; `continues_last_turn`: where the last
    message does. `thinks`: whether the model shall reason; None: as the template has it. `may_lose_reasoning`: that of
    earlier turns is left out where the template does not read it.
    """

    messages: Sequence[Mapping[str, Any]]
    variables: Mapping[str, Any] = field(default_factory=dict)
    asks_for_answer: bool = True
    continues_last_turn: bool = False
    tools: Sequence[Tool] = ()
    thinks: bool | None = None
    may_lose_reasoning: bool = False

    @property
    def num_chars(self) -> int:
        """Of all that it says."""
        said = (list(self.messages), self.variables, self.tools_told)
        return sum(len(text) for it in said for text in _texts_in(it))

    @property
    def tools_told(self) -> list[Any] | None:
        """As templates read them; None: there are none."""
        return [{"type": "function", "function": _function(it)} for it in self.tools] or None


class ChatTemplate:
    """One template, compiled, and the control tokens that it writes."""

    def __init__(self, sandbox: Sandbox, twin: Twin, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises TemplateError for a source that does not compile, and whatever else Python's compiler makes of it;
        InvalidRequest for one that writes what is no text."""
        self._sandbox, self._special_tokens = sandbox, special_tokens
        self._template: Template = sandbox.compiled(source)
        self._words = frozenset(_WORDS.findall(source))
        self._source = source
        self.reasoning = reasoning_of(source)
        self._roles_of_parts: frozenset[str] = frozenset()
        self._roles_of_parts = self._read_as_parts()
        try:
            self._control_tokens = ControlTokens(twin, source, self._rehearse())
        except (TypeError, UnicodeEncodeError):  # a lone surrogate
            raise InvalidRequest("what it makes is not valid Unicode", param="messages") from None

    @cached_property
    def _variables(self) -> frozenset[str]:
        """Those that it reads. It is parsed once more for that, so only where a request sets one."""
        return frozenset(meta.find_undeclared_variables(self._sandbox.parsed(self._source)))

    def tokens_of(self, conversation: Conversation, tokenizer: Tokenizer) -> tuple[Tokenizer, str]:
        """What is to be tokenized, and by which tokenizer. What messages and variables say is text, even where it
        spells a control token; an assistant's earlier turn is the exception, since the model may have generated it."""
        hide = self._control_tokens.hide
        hidden = replace(
            conversation,
            messages=[_hidden_message(it, hide) for it in conversation.messages],
            variables=_hidden(conversation.variables, hide),
            tools=[_hidden_tool(it, hide) for it in conversation.tools],
        )
        others = [{name: it[name] for name in it if name not in _generated(it)} for it in conversation.messages]
        said = [text for it in (others, conversation.variables, conversation.tools_told) for text in _texts_in(it)]
        text = self.render(hidden)
        try:
            if self._control_tokens.may_be_spelled(said):
                return self._control_tokens.seal(text)
        except (TypeError, UnicodeEncodeError):  # a lone surrogate, for a normalizer
            raise InvalidRequest("the text is not valid Unicode", param="messages") from None
        return tokenizer, text

    def render(self, conversation: Conversation) -> str:
        """The conversation as the model was trained to read it, special tokens and all. Raises InvalidRequest."""
        if conversation.thinks is not None:
            variables = switched(
                conversation.thinks, conversation.variables, self._variables, self.reasoning is not None
            )
            conversation = replace(conversation, variables=variables)
        self._refuse_what_is_not_read(conversation)
        return self._rendered(conversation, self._style(conversation))

    def _style(self, conversation: Conversation) -> Style:
        has_calls = any(it.get("tool_calls") for it in conversation.messages)
        return (self.tool_use.style if has_calls else None) or Style()

    def _rendered(self, conversation: Conversation, style: Style) -> str:
        turn = OpenTurn(conversation.messages) if conversation.continues_last_turn else None
        said = style.shaped(conversation.messages if turn is None else turn.messages)
        messages = [self._shaped(it) for it in said]
        tools = conversation.tools_told
        try:
            fixed = dict(messages=messages, add_generation_prompt=conversation.asks_for_answer, tools=tools)
            text = self._sandbox.rendered(self._template, {**conversation.variables, **self._special_tokens, **fixed})
        except TemplateError as error:  # by the template itself, for roles it does not take
            raise InvalidRequest(f"the chat template refuses these messages: {error}", param="messages") from None
        except Exception as error:  # a template is a program, and not ours
            raise InvalidRequest(
                f"the chat template fails on these messages ({type(error).__name__})", param="messages"
            ) from None
        return text if turn is None else turn.cut(text)

    def _refuse_what_is_not_read(self, conversation: Conversation) -> None:
        """It would change nothing, and its sender would think that it did."""
        for name, value in conversation.variables.items():
            if name not in self._variables and (name, value) != ("reasoning_effort", "none"):  # which asks for nothing
                known = ", ".join(sorted(self._variables - {*self._special_tokens, *_SET_BY_US})) or "none"
                raise InvalidRequest(
                    f"this model's chat template does not read {name[:100]!r}; of what a request may set it reads: "
                    f"{known}",
                    param="reasoning_effort" if name == "reasoning_effort" else "chat_template_kwargs",
                    code="unsupported_parameter",
                )
        # a template that knows reasoning and does not read it leaves out that of earlier turns, as it was written to
        may_lose_reasoning = conversation.may_lose_reasoning or self.reasoning is not None
        for message in conversation.messages:
            if "reasoning_content" in message and "reasoning_content" not in self._words and not may_lose_reasoning:
                raise InvalidRequest(
                    "this model's chat template does not read reasoning_content; send messages without it",
                    param="messages",
                    code="unsupported_parameter",
                )
        if conversation.tools or any(it.get("tool_calls") or it["role"] == "tool" for it in conversation.messages):
            self._refuse_tools(conversation)

    def _refuse_tools(self, conversation: Conversation) -> None:
        use, roles = self.tool_use, {it["role"] for it in conversation.messages}
        if conversation.tools and not use.writes_tools:
            raise _unread("this model's chat template does not write tools; ask a model or an adapter whose template "
                          "does, or send none", "tools")  # fmt: skip
        if use.style is None and any(it.get("tool_calls") for it in conversation.messages):
            raise _unread("this model's chat template does not write calls of tools; send messages without "
                          "tool_calls", "messages")  # fmt: skip
        if "tool" in roles and not use.writes_results:
            raise _unread("this model's chat template does not write results of tools; send messages of other roles "
                          "than 'tool'", "messages")  # fmt: skip

    @cached_property
    def tool_use(self) -> ToolUse:
        """What it does with tools. It is rendered a dozen times for that, when it is first asked."""

        def render(messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], asks: bool, style: Style) -> str:
            return self._rendered(Conversation(messages, {}, asks, tools=tools), style)

        return Rehearsal(render, list(CALL_FORMATS.values())).tool_use()

    def _shaped(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        if message["role"] not in self._roles_of_parts or not isinstance(message["content"], str):
            return message
        return {**message, "content": [{"type": "text", "text": message["content"]}]}

    def _read_as_parts(self) -> frozenset[str]:
        """Roles whose messages it reads as a list of parts only, as templates of multimodal models may: of one that is
        a string they write nothing, without an error."""
        known = frozenset(role for roles in _TURNS for role in roles)
        marks = {role: str(10**9 + secrets.randbelow(9 * 10**9)) for role in known}
        lost = known - self._roles_written(marks)
        if not lost:
            return frozenset()
        self._roles_of_parts = lost
        return lost & self._roles_written(marks)

    def _roles_written(self, marks: Mapping[str, str]) -> frozenset[str]:
        """Whose words it writes: not those whose parts it writes as Python or JSON does."""
        texts = [_DATA.sub("", self._written_of(roles, marks)) for roles in _TURNS]
        return frozenset(role for role, mark in marks.items() if any(mark in text for text in texts))

    def _written_of(self, roles: Sequence[str], contents: Mapping[str, str]) -> str:
        with suppress(InvalidRequest):
            turns = [{"role": role, "content": contents[role]} for role in roles]
            return self._rendered(Conversation(turns), Style())
        return ""

    def _rehearse(self) -> list[str]:
        """What the template makes of conversations of every role that it takes."""
        made = (self._written_of(roles, dict.fromkeys(roles, "Hello.")) for roles in _TURNS)
        return [text for text in made if text]


_TURNS = (("user", "assistant", "user"), ("system", "user"), ("user", "assistant", "tool"))
_DATA = re.compile(r"""["']text["']: ?["'][0-9]+""")
_SET_BY_US = frozenset({"add_generation_prompt", "messages", "raise_exception", "strftime_now", "tools"})


def _function(tool: Tool) -> dict[str, Any]:
    told = {} if tool.description is None else {"description": tool.description}
    return {"name": tool.name, **told, "parameters": tool.parameters or {"type": "object", "properties": {}}}


def _generated(message: Mapping[str, Any]) -> dict[str, Any]:
    """What of a message the model may have said itself, control tokens and all."""
    if message["role"] != "assistant":
        return {}
    return {name: message[name] for name in ("content", "reasoning_content") if name in message}


def _unread(message: str, param: str) -> InvalidRequest:
    return InvalidRequest(message, param=param, code="unsupported_parameter")


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, it in value.items():
            yield key
            yield from _texts_in(it)
    elif isinstance(value, list):
        for it in value:
            yield from _texts_in(it)


def _hidden(value: Any, hide: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return hide(value)
    if isinstance(value, Mapping):
        return {hide(key): _hidden(it, hide) for key, it in value.items()}
    return [_hidden(it, hide) for it in value] if isinstance(value, list) else value


def _hidden_message(message: Mapping[str, Any], hide: Callable[[str], str]) -> dict[str, Any]:
    """Roles and the names of fields are not its sender's words."""
    its = {name: value if name == "role" else _hidden(value, hide) for name, value in message.items()}
    if message.get("tool_calls"):
        its["tool_calls"] = [
            {
                **it,
                "id": hide(it["id"]),
                "function": {name: _hidden(value, hide) for name, value in it["function"].items()},
            }
            for it in message["tool_calls"]
        ]
    return {**its, **_generated(message)}


def _hidden_tool(tool: Tool, hide: Callable[[str], str]) -> Tool:
    return Tool(hide(tool.name), _hidden(tool.description, hide), _hidden(tool.parameters, hide), tool.is_strict)
