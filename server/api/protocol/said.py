"""Messages of a conversation, as chat and /tokenize have them."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    JsonValue,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.config import JsonDict

from server.api.protocol.body import Body, Label, Unserved, limits_of, refuse_other_types
from server.api.protocol.calls_made import CallMade, CallsMade, read_arguments
from server.api.protocol.schema import SOMETHING, at_most
from server.errors import InvalidRequest

AS_TEXT = "of anything else send its text, of an object json.dumps(...) for instance"


class TextPart(Body):
    WITHIN = "messages"

    type: Literal["text"]
    text: str


class FunctionCall(Body):
    """`parsed_arguments` is what OpenAI's client makes of the arguments, and sends back beside them."""

    WITHIN = "messages"

    name: Annotated[Label, Field(min_length=1)]
    arguments: str
    parsed_arguments: Any = None
    _read: dict[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def read(self) -> dict[str, Any]:
        """The arguments as the object that they are."""
        return self._read

    @read.setter
    def read(self, arguments: dict[str, Any]) -> None:
        self._read = arguments


class ToolCall(Body):
    """`index` is a place in a stream, and comes back with what a client has put together."""

    WITHIN = "messages"

    id: Annotated[Label, Field(min_length=1)]
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None

    @property
    def said(self) -> dict[str, Any]:
        return CallMade(self.id, self.function.name, self.function.read).said


_NO_TEXT: JsonDict = {"enum": [None, ""]}
_NO_CALLS: JsonDict = {"anyOf": [{"type": "null"}, {"type": "array", "maxItems": 0}]}
_NOT_A_TOOLS: dict[str, JsonValue] = {"tool_call_id": _NO_TEXT, "name": _NO_TEXT}
_NOT_AN_ASSISTANTS: dict[str, JsonValue] = {
    "tool_calls": _NO_CALLS,
    "reasoning_content": _NO_TEXT,
    "parsed": {"type": "null"},
}
_CALLS: JsonDict = {"type": "array", "minItems": 1}
_BY_ROLE: JsonDict = {"oneOf": [
    {"required": ["content"], "properties": {"role": {"enum": ["system", "developer", "user"]}, "content": SOMETHING,
                                             **_NOT_A_TOOLS, **_NOT_AN_ASSISTANTS}},
    {"properties": {"role": {"const": "assistant"}, **_NOT_A_TOOLS},
     "anyOf": [{"required": ["content"], "properties": {"content": SOMETHING}},
               {"required": ["tool_calls"], "properties": {"tool_calls": _CALLS}}]},
    {"required": ["content", "tool_call_id"],
     "properties": {"role": {"const": "tool"}, "content": SOMETHING, "tool_call_id": {"type": "string", "minLength": 1},
                    **_NOT_AN_ASSISTANTS}},
]}  # fmt: skip


class Message(Body):
    """`parsed` is what OpenAI's client makes of the content, and sends back beside it."""

    WITHIN = "messages"
    # fields of an answer's message, which clients send back with the conversation; empty, they say nothing
    UNSERVED: ClassVar[Unserved] = {
        name: ([], {}, "") for name in ("annotations", "audio", "function_call", "reasoning", "refusal")
    }  # fmt: skip
    REMEDIES = {"reasoning": "send reasoning_content"}

    model_config = ConfigDict(json_schema_extra=_BY_ROLE)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: Label | None = None
    name: Label | None = None
    parsed: Any = None

    @field_validator("content", mode="before")
    @classmethod
    def _refuse_other_parts(cls, content: Any) -> Any:
        if content is not None and not isinstance(content, str | list):
            told = f"content in messages must be a text, or a list of parts of type text; {AS_TEXT}"
            raise InvalidRequest(told, param="messages", code="invalid_value")
        refuse_other_types(content, "content", ("text",), "messages", " in messages")
        return content

    @field_validator("tool_calls", mode="before")
    @classmethod
    def _refuse_other_calls(cls, calls: Any) -> Any:
        refuse_other_types(calls, "a call", ("function",), "messages", " in messages")
        return calls

    @model_validator(mode="after")
    def _check_by_role(self) -> Self:
        if self.role != "assistant":
            self._refuse("reasoning_content", "only assistants reason")
            self._refuse("tool_calls", "only assistants call tools")
            self._refuse("parsed", "it comes with an assistant's")
        if self.role != "tool":
            self._refuse("tool_call_id", "only messages of the role tool answer calls")
            self._refuse("name", "only messages of the role tool have one that is read")
        elif not self.tool_call_id:
            raise InvalidRequest(
                "a message of the role tool needs tool_call_id", param="messages", code="invalid_value"
            )
        if self.content is None and not self.tool_calls:
            raise InvalidRequest(f"a message of the role {self.role} needs content", param="messages",
                                 code="invalid_value")  # fmt: skip
        return self

    def _refuse(self, name: str, reason: str) -> None:
        if getattr(self, name):
            raise InvalidRequest(
                f"{name} in a message of the role {self.role} is not served: {reason}",
                param="messages",
                code="unsupported_parameter",
            )

    @property
    def template_role(self) -> str:
        """`developer` is OpenAI's later word for `system`; templates know only that one, and would drop the other."""
        return "system" if self.role == "developer" else self.role

    @property
    def text(self) -> str:
        if self.content is None:
            return ""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    @property
    def said(self) -> dict[str, Any]:
        """As templates read it."""
        told: dict[str, Any] = {"role": self.template_role, "content": self.text}
        if self.reasoning_content:
            told["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            told["tool_calls"] = [it.said for it in self.tool_calls]
        if self.role == "tool":
            told |= {"tool_call_id": self.tool_call_id, "name": self.name}
        return told


def counted(messages: Any, info: ValidationInfo, param: str = "messages") -> Any:
    """Before they are built."""
    limits = limits_of(info)
    if not isinstance(messages, list):
        return messages
    if len(messages) > limits.max_messages:
        raise InvalidRequest(f"{len(messages):,} messages; at most {limits.max_messages:,} are served", param=param)
    lists = (
        message.get(name) for message in messages if isinstance(message, dict) for name in ("content", "tool_calls")
    )
    parts = sum(len(it) for it in lists if isinstance(it, list))
    if parts > limits.max_parts:
        raise InvalidRequest(
            f"{parts:,} parts of content and calls of tools; at most {limits.max_parts:,} are served", param=param
        )
    return messages


def _with_calls_read(messages: list[Message]) -> list[Message]:
    """Arguments as the objects that they are, and results with the names of what they are results of."""
    calls = [call for it in messages for call in it.tool_calls or ()]
    arguments = read_arguments([it.function.arguments for it in calls], "messages")
    for call, its in zip(calls, arguments, strict=True):
        call.function.read = its
    made = CallsMade("messages")
    for it in messages:
        if it.role == "assistant":
            made.turn()
            for call in it.tool_calls or ():
                made.made(CallMade(call.id, call.function.name, call.function.read))
        elif it.role == "tool":
            it.name = made.name_of(it.tool_call_id or "", it.name)
    return messages


def check_continuation(messages: Sequence[Message] | None, continues: bool | None, asks: bool | None) -> None:
    """Raises InvalidRequest where the last message cannot be continued."""
    if not continues:
        return
    if asks:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt ask for two ends of the prompt; send one",
            param="continue_final_message",
        )
    if not messages or messages[-1].role != "assistant" or messages[-1].tool_calls:
        raise InvalidRequest(
            "continue_final_message needs a last message of the role assistant, without tool_calls",
            param="continue_final_message",
        )


Messages = Annotated[
    list[Message],
    Field(min_length=1, fail_fast=True, json_schema_extra=at_most("max_messages", is_list=True)),
    AfterValidator(_with_calls_read),
]
