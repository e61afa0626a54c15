"""What /v1/responses reads: items, which together are a conversation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator

from server.api.protocol.body import Body, Label, Unserved, limits_of, refuse_other_types
from server.api.protocol.calls_made import CallMade, CallsMade, read_arguments
from server.api.protocol.said import AS_TEXT
from server.api.protocol.schema import at_most
from server.errors import InvalidRequest

_KINDS = ("message", "function_call", "function_call_output", "reasoning")
_LISTS = ("content", "output", "summary")  # of parts
_PARTS = {"content": ("input_text", "output_text", "reasoning_text"), "output": ("input_text",)}
_REMEDIES = {"item_reference": "nothing is stored here, so send the item itself"}
Status = Literal["in_progress", "completed", "incomplete"]
CallId = Annotated[Label, Field(min_length=1)]


class InputPart(Body):
    """`logprobs` are what an earlier answer was told, and `parsed` is what OpenAI's client made of its text; no model
    reads them."""

    WITHIN = "input"
    UNSERVED: ClassVar[Unserved] = {"annotations": ([],), "prompt_cache_breakpoint": ()}

    type: Literal["input_text", "output_text"]
    text: str
    logprobs: list[Any] | None = None
    parsed: Any = None


class OutputPart(Body):
    """Of a call."""

    WITHIN = "input"
    UNSERVED: ClassVar[Unserved] = {"prompt_cache_breakpoint": ()}

    type: Literal["input_text"]
    text: str


class ReasoningPart(Body):
    WITHIN = "input"

    type: Literal["reasoning_text"]
    text: str


def _as_parts(name: str) -> Callable[[Any], Any]:
    """A text stands for one part."""

    def parts(value: Any) -> Any:
        if isinstance(value, str):
            return [{"type": "input_text", "text": value}]
        if not isinstance(value, list):
            told = f"{name} in input must be a text, or a list of parts; {AS_TEXT}"
            raise InvalidRequest(told, param="input", code="invalid_value")
        return value

    return parts


class InputMessage(Body):
    """`id` and `status` come with the output of an earlier answer, and say nothing to a model: here and below."""

    WITHIN = "input"
    UNSERVED: ClassVar[Unserved] = {"phase": ()}

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Annotated[list[InputPart], Field(fail_fast=True)]
    id: Label | None = None
    status: Status | None = None

    _parts = field_validator("content", mode="before", json_schema_input_type=str | list[InputPart])(
        _as_parts("content")
    )

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content)


class CallItem(Body):
    """`parsed_arguments` is what OpenAI's client made of the arguments."""

    WITHIN = "input"
    UNSERVED: ClassVar[Unserved] = {"async": (False,), "caller": ({"type": "direct"},), "namespace": ()}

    type: Literal["function_call"]
    call_id: CallId
    name: CallId
    arguments: str
    id: Label | None = None
    status: Status | None = None
    parsed_arguments: Any = None


class CallOutputItem(Body):
    WITHIN = "input"
    UNSERVED: ClassVar[Unserved] = {"caller": ({"type": "direct"},), "created_by": ()}

    type: Literal["function_call_output"]
    call_id: CallId
    output: Annotated[list[OutputPart], Field(fail_fast=True)]
    id: Label | None = None
    status: Status | None = None

    _parts = field_validator("output", mode="before", json_schema_input_type=str | list[OutputPart])(
        _as_parts("output")
    )

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.output)


class ReasoningItem(Body):
    WITHIN = "input"
    UNSERVED: ClassVar[Unserved] = {"encrypted_content": (), "summary": ([],)}
    REMEDIES = {
        "encrypted_content": "nobody here can read it; send reasoning as content, or leave the item out",
        "summary": "send reasoning as content",
    }

    type: Literal["reasoning"]
    content: Annotated[list[ReasoningPart], Field(fail_fast=True)] | None = None
    id: Label | None = None
    status: Status | None = None

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content or ())


def _kind(item: Any) -> str:
    """Each is told from the others by itself: of a plain union, pydantic would try every one."""
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return f"a {kind}" if kind in _KINDS else "a message"


Item = Annotated[
    Annotated[InputMessage, Tag("a message")]
    | Annotated[CallItem, Tag("a function_call")]
    | Annotated[CallOutputItem, Tag("a function_call_output")]
    | Annotated[ReasoningItem, Tag("a reasoning")],
    Discriminator(_kind),
]
Input = Annotated[
    list[Item],
    Field(min_length=1, fail_fast=True, json_schema_extra=at_most("max_messages", is_list=True)),
]


def counted_items(items: Any, info: ValidationInfo) -> Any:
    """Before they are built; those of other types, and with other parts, are refused by name. A text is what a user
    says."""
    limits = limits_of(info)
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    if not isinstance(items, list):
        raise InvalidRequest("input must be a text, or a list of messages", param="input", code="invalid_value")
    if len(items) > limits.max_messages:
        raise InvalidRequest(f"{len(items):,} messages; at most {limits.max_messages:,} are served", param="input")
    known = [it for it in items if isinstance(it, dict)]
    lists = [(name, it[name]) for it in known for name in _LISTS if isinstance(it.get(name), list)]
    num_parts = sum(len(parts) for _, parts in lists)
    if num_parts > limits.max_parts:
        raise InvalidRequest(f"{num_parts:,} parts of content; at most {limits.max_parts:,} are served", param="input")
    refuse_other_types(known, "an item", _KINDS, "input", " in input", _REMEDIES)
    for name, parts in lists:
        if name in _PARTS:
            refuse_other_types(parts, name, _PARTS[name], "input", " in input")
    return items


# -- items to turns ---


@dataclass
class _Turn:
    """Of the assistant's, which an answer sends back as several items."""

    reasoning: list[str] = field(default_factory=list)
    text: str | None = None
    calls: list[CallMade] = field(default_factory=list)

    @property
    def said(self) -> dict[str, Any]:
        said: dict[str, Any] = {"role": "assistant", "content": self.text or ""}
        if reasoning := "\n".join(filter(None, self.reasoning)):
            said["reasoning_content"] = reasoning
        return said | ({"tool_calls": [it.said for it in self.calls]} if self.calls else {})


def turns(items: Sequence[InputMessage | CallItem | CallOutputItem | ReasoningItem]) -> list[dict[str, Any]]:
    """As templates read them. Items of the assistant's that follow each other are one turn, but two texts are two.
    Raises InvalidRequest."""
    arguments = iter(read_arguments([it.arguments for it in items if isinstance(it, CallItem)], "input"))
    calls, said, turn = CallsMade("input"), list[dict[str, Any] | _Turn](), None
    for it in items:
        if isinstance(it, CallOutputItem) or (isinstance(it, InputMessage) and it.role != "assistant"):
            turn = None
            said.append(calls.result(it.call_id, it.text) if isinstance(it, CallOutputItem) else _message(it))
            continue
        if turn is None or not _goes_on(turn, it):
            turn = _Turn()
            said.append(turn)
            calls.turn()
        if isinstance(it, CallItem):
            turn.calls.append(calls.made(CallMade(it.call_id, it.name, next(arguments))))
        elif isinstance(it, ReasoningItem):
            turn.reasoning.append(it.text)
        else:
            turn.text = it.text
    return [it.said if isinstance(it, _Turn) else it for it in said]


def _goes_on(turn: _Turn, item: InputMessage | CallItem | ReasoningItem) -> bool:
    if isinstance(item, CallItem):
        return True
    return turn.text is None or (isinstance(item, ReasoningItem) and bool(turn.calls))


def _message(it: InputMessage) -> dict[str, Any]:
    """Templates know OpenAI's later word for `system` no more than in chat."""
    return {"role": "system" if it.role == "developer" else it.role, "content": it.text}
