"""What turns of /v1/messages consist of: Anthropic's blocks."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)
from pydantic.config import JsonDict

from server.api.protocol.body import Body, Label, Unserved, refuse_other_types
from server.api.protocol.calls_made import CallMade, CallsMade, checked_arguments
from server.api.protocol.said import AS_TEXT
from server.errors import InvalidRequest

OF_ROLE = {"user": ("text", "tool_result"), "assistant": ("text", "thinking", "tool_use")}
_REMEDIES = {"redacted_thinking": "nobody here can read it, so leave it out"}
# before what a call came to where it failed: templates have no other place for that
FAILED = "Error: "
BlockId = Annotated[Label, Field(min_length=1)]


class CacheControl(Body):
    """A label: equal beginnings are found in the cache without it."""

    WITHIN = "cache_control"

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(Body):
    """`parsed_output` is what Anthropic's client made of the text."""

    WITHIN = "content"
    UNSERVED: ClassVar[Unserved] = {"citations": ([],)}

    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    parsed_output: Any = None


def blocks(content: Any, info: ValidationInfo) -> Any:
    """A text stands for one block."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        name = str(info.field_name)
        told = f"{name} must be a text, or a list of text blocks; {AS_TEXT}"
        param = "messages" if name == "content" else name
        raise InvalidRequest(told, param=param, code="invalid_value")
    return content


Text = Annotated[
    list[TextBlock], Field(fail_fast=True), BeforeValidator(blocks, json_schema_input_type=str | list[TextBlock])
]


class ThinkingBlock(Body):
    """`signature` is what came with it; it proves nothing here."""

    WITHIN = "content"

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class ToolUseBlock(Body):
    WITHIN = "content"
    UNSERVED: ClassVar[Unserved] = {"caller": ({"type": "direct"},), "toolset_name": ()}

    type: Literal["tool_use"]
    id: BlockId
    name: BlockId
    input: Annotated[dict[str, Any], WithJsonSchema({"type": "object"})]
    cache_control: CacheControl | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _check_input(cls, value: Any) -> Any:
        return checked_arguments(value, "messages")


class ToolResultBlock(Body):
    """`is_error`: the model reads FAILED before the content."""

    WITHIN = "content"
    UNSERVED: ClassVar[Unserved] = {"toolset_name": ()}

    type: Literal["tool_result"]
    tool_use_id: BlockId
    content: Text | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None

    @property
    def text(self) -> str:
        return (FAILED if self.is_error else "") + text_of(self.content or ())


def text_of(blocks: Iterable[TextBlock]) -> str:
    return "".join(block.text for block in blocks)


def _kind(block: Any) -> str:
    """Each is told from the others by itself: of a plain union, pydantic would try every one."""
    kind = block.get("type") if isinstance(block, dict) else getattr(block, "type", None)
    return f"a {kind}" if kind in ("thinking", "tool_use", "tool_result") else "a text"


Block = Annotated[
    Annotated[TextBlock, Tag("a text")]
    | Annotated[ThinkingBlock, Tag("a thinking")]
    | Annotated[ToolUseBlock, Tag("a tool_use")]
    | Annotated[ToolResultBlock, Tag("a tool_result")],
    Discriminator(_kind),
]


def _of(role: str) -> JsonDict:
    types: list[JsonValue] = [*OF_ROLE[role]]
    block: JsonDict = {"type": "array", "items": {"properties": {"type": {"enum": types}}}}
    return {"properties": {"role": {"const": role}, "content": {"anyOf": [{"type": "string"}, block]}}}


class Turn(Body):
    WITHIN = "messages"

    model_config = ConfigDict(json_schema_extra={"oneOf": [_of(role) for role in OF_ROLE]})

    role: Literal["user", "assistant"]
    content: Annotated[
        list[Block], Field(fail_fast=True), BeforeValidator(blocks, json_schema_input_type=str | list[Block])
    ]

    @property
    def calls(self) -> list[ToolUseBlock]:
        return [it for it in self.content if isinstance(it, ToolUseBlock)]


def refuse_other_blocks(content: Any, param: str, served: Sequence[str], of: str = "") -> None:
    """By name, before they are typed, also in results. `of`: whose they are."""
    refuse_other_types(content, "content", served, param, f" in {param}{of}", _REMEDIES)
    for block in content if isinstance(content, list) else ():
        if isinstance(block, dict) and block.get("type") == "tool_result":
            refuse_other_blocks(block.get("content"), param, ("text",), ", in a tool_result,")


def said(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """As templates read them: results are messages of their own, before what a user says besides. Raises
    InvalidRequest."""
    calls, said = CallsMade("messages"), list[dict[str, Any]]()
    for turn in turns:
        said += _answered(turn, calls) if turn.role == "user" else [_assistants(turn, calls)]
    return said


def _answered(turn: Turn, calls: CallsMade) -> list[dict[str, Any]]:
    results = [it for it in turn.content if isinstance(it, ToolResultBlock)]
    texts = [it for it in turn.content if isinstance(it, TextBlock)]
    if any(isinstance(it, ToolResultBlock) for it in turn.content[len(results) :]):
        told = "in messages, tool_result blocks come before a turn's text"
        raise InvalidRequest(told, param="messages", code="invalid_value")
    told_of = [calls.result(it.tool_use_id, it.text) for it in results]
    return [*told_of, {"role": "user", "content": text_of(texts)}] if texts or not results else told_of


def _assistants(turn: Turn, calls: CallsMade) -> dict[str, Any]:
    calls.turn()
    said: dict[str, Any] = {
        "role": "assistant",
        "content": text_of(it for it in turn.content if isinstance(it, TextBlock)),
    }
    if thought := "\n".join(it.thinking for it in turn.content if isinstance(it, ThinkingBlock) and it.thinking):
        said["reasoning_content"] = thought
    if made := [calls.made(CallMade(it.id, it.name, it.input)) for it in turn.calls]:
        said["tool_calls"] = [it.said for it in made]
    return said
