"""A conversation to the text that the model was trained to read, and to tokens."""

import re
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jinja2 import Template, TemplateError, meta
from tokenizers import Tokenizer

from server.api.texts.control_tokens import ControlTokens, Twin
from server.api.texts.open_turn import OpenTurn
from server.api.texts.template_sandbox import Sandbox
from server.errors import InvalidRequest

_WORDS = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Conversation:
    """Messages (role, content, and reasoning_content where an assistant's has it), and what else the template is told.

    `asks_for_answer`: what is rendered ends where the model's answer begins; `continues_last_turn`: where the last
    message does.
    """

    messages: Sequence[Mapping[str, str]]
    variables: Mapping[str, Any] = field(default_factory=dict)
    asks_for_answer: bool = True
    continues_last_turn: bool = False

    @property
    def num_chars(self) -> int:
        """Of all that it says."""
        said = [text for it in self.messages for text in it.values()]
        return sum(map(len, said)) + sum(map(len, _texts_in(self.variables)))


class ChatTemplate:
    """One template, compiled, and the control tokens that it writes."""

    def __init__(self, sandbox: Sandbox, twin: Twin, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises TemplateError for a source that does not compile, and whatever else Python's compiler makes of it;
        InvalidRequest for one that writes what is no text."""
        self._sandbox, self._special_tokens = sandbox, special_tokens
        self._template: Template = sandbox.compiled(source)
        self._words = frozenset(_WORDS.findall(source))
        self._source = source
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
        others = [it for it in conversation.messages if it["role"] != "assistant"]
        said = [text for it in others for text in it.values()] + _texts_in(conversation.variables)
        hidden = Conversation(
            [
                it if it["role"] == "assistant" else {name: hide(text) for name, text in it.items()}
                for it in conversation.messages
            ],
            {name: _hidden(value, hide) for name, value in conversation.variables.items()},
            conversation.asks_for_answer,
            conversation.continues_last_turn,
        )
        text = self.render(hidden)
        try:
            if self._control_tokens.may_be_spelled(said):
                return self._control_tokens.seal(text)
        except (TypeError, UnicodeEncodeError):  # a lone surrogate, for a normalizer
            raise InvalidRequest("the text is not valid Unicode", param="messages") from None
        return tokenizer, text

    def render(self, conversation: Conversation) -> str:
        """The conversation as the model was trained to read it, special tokens and all. Raises InvalidRequest."""
        self._refuse_what_is_not_read(conversation)
        turn = OpenTurn(conversation.messages) if conversation.continues_last_turn else None
        messages = [self._shaped(it) for it in (conversation.messages if turn is None else turn.messages)]
        try:
            fixed = dict(messages=messages, add_generation_prompt=conversation.asks_for_answer, tools=None)
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
        for message in conversation.messages:
            if "reasoning_content" in message and "reasoning_content" not in self._words:
                raise InvalidRequest(
                    "this model's chat template does not read reasoning_content; send messages without it",
                    param="messages",
                    code="unsupported_parameter",
                )

    def _shaped(self, message: Mapping[str, str]) -> Mapping[str, Any]:
        if message["role"] not in self._roles_of_parts:
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
            return self.render(Conversation([{"role": role, "content": contents[role]} for role in roles]))
        return ""

    def _rehearse(self) -> list[str]:
        """What the template makes of conversations of every role that it takes."""
        made = (self._written_of(roles, dict.fromkeys(roles, "Hello.")) for roles in _TURNS)
        return [text for text in made if text]


_TURNS = (("user", "assistant", "user"), ("system", "user"), ("user", "assistant", "tool"))
_DATA = re.compile(r"""["']text["']: ?["'][0-9]+""")
_SET_BY_US = frozenset({"add_generation_prompt", "messages", "raise_exception", "strftime_now", "tools"})


def _texts_in(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for key, it in value.items() for text in (key, *_texts_in(it))]
    return [text for it in value for text in _texts_in(it)] if isinstance(value, list) else []


def _hidden(value: Any, hide: Any) -> Any:
    if isinstance(value, str):
        return hide(value)
    if isinstance(value, Mapping):
        return {hide(key): _hidden(it, hide) for key, it in value.items()}
    return [_hidden(it, hide) for it in value] if isinstance(value, list) else value
