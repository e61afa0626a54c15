"""Answers against the types of the clients that read them."""

from collections.abc import Collection, Iterator
from typing import Any

import httpx
from pydantic import BaseModel, TypeAdapter

# of OpenAI's responses, what belongs to services around the model that there are not here; and what they have besides
NOT_OF_RESPONSES = frozenset({
    "access_programs", "image", "input_transformations", "moderation", "phase", "prompt_cache_diagnostics",
    "prompt_cache_options", "tool_usage", "context", "mode", "generate_summary", "verbosity",
    "cache_write_tokens_details", "allowed_callers", "async_", "caller", "defer_loading", "namespace", "output_schema",
})  # fmt: skip
MORE_IN_RESPONSES = frozenset({"bytes", "store", "frequency_penalty", "presence_penalty"})
# of Anthropic's messages, what belongs to its own tools and to bills
NOT_OF_MESSAGES = frozenset({
    "cache_creation", "caller", "diagnostics", "inference_geo", "server_tool_use", "speed", "toolset_name",
})  # fmt: skip


def checked(kind: Any, body: object, absent: Collection[str] = (), more: Collection[str] = ()) -> Any:
    """`body` as a `kind`, in strict types. It must have every field of each type in it, at any depth, but those that
    `absent` names, and no others but those in `more`."""
    parsed = TypeAdapter(kind).validate_python(body, strict=True)
    missing = {f"{type(it).__name__}.{name}" for it in _models(parsed) for name in _missing(it)}
    assert {it for it in missing if it.partition(".")[2] not in absent} == set()
    assert {name for it in _models(parsed) for name in it.model_extra or ()} <= set(more)
    return parsed


def _missing(model: BaseModel) -> set[str]:
    return set(type(model).model_fields) - model.model_fields_set


def _models(value: Any) -> Iterator[BaseModel]:
    if isinstance(value, BaseModel):
        yield value
        for name in type(value).model_fields:
            yield from _models(getattr(value, name))
    elif isinstance(value, list):
        for it in value:
            yield from _models(it)


def typed_events(response: httpx.Response) -> Iterator[tuple[str, str]]:
    """An independent reading of a stream of named events: each one's name and data; comments are passed over."""
    for block in "\n".join(response.iter_lines()).strip("\n").split("\n\n"):
        if block and not block.startswith(":"):
            name, data = block.strip("\n").split("\n")
            assert name.startswith("event: ") and data.startswith("data: ")
            yield name.removeprefix("event: "), data.removeprefix("data: ")
