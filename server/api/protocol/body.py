"""What all request bodies have in common: strict types, finite numbers, and no field that is passed over in silence.

A field that a client may know from elsewhere and that is not served is listed in its body's UNSERVED and refused by
name, unless its value asks for nothing. Any other unknown field is refused as unknown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic.config import JsonDict
from pydantic_core import CoreSchema

from server.errors import InvalidRequest

Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, lt=2**64)]  # what is served is less; this is so that a message can repeat it
Label = Annotated[str, Field(max_length=1024)]
Unserved = Mapping[str, tuple[object, ...]]  # by field: the values that ask for nothing, beside null

_MOST_METADATA, _LONGEST_KEY, _LONGEST_VALUE = 16, 64, 512  # OpenAI's


def asks_for_nothing(value: object, harmless: tuple[object, ...]) -> bool:
    return value is None or any(value == free and type(value) is type(free) for free in harmless)


def refuse_other_types(
    items: Any, what: str, served: Sequence[str], param: str, where: str = "", remedies: Mapping[str, str] | None = None
) -> None:
    """By name, before they are typed. `items`: one, or a list of them; `what` and `where` they are, for what is said;
    `remedies` by type. Raises InvalidRequest."""
    for it in items if isinstance(items, list) else (items,):
        if isinstance(it, dict) and isinstance(kind := it.get("type"), str) and kind not in served:
            raise InvalidRequest(
                f"{what} of type {kind[:40]!r}{where} is not served{_instead(kind, served, remedies or {})}",
                param=param,
                code="unsupported_parameter",
            )


def _instead(kind: str, served: Sequence[str], remedies: Mapping[str, str]) -> str:
    if kind in remedies:
        return f"; {remedies[kind]}"
    if any(word in kind for word in ("image", "audio", "video", "file", "document")):
        return ": models read text here, and of a multimodal model the text half alone is served"
    return f"; {', '.join(served)} {'is' if len(served) == 1 else 'are'}"


@dataclass(frozen=True)
class BodyLimits:
    """Counts that are checked before the items they count. pydantic hands them to validators as their context."""

    max_model_len: int  # tokens
    vocab_size: int
    max_prompts: int
    max_n: int
    max_stop: int
    max_stop_chars: int
    max_messages: int
    max_parts: int  # of all messages together
    max_logprobs: int  # most probable tokens that are named in one place
    max_tools: int


def limits_of(info: ValidationInfo) -> BodyLimits:
    return cast(BodyLimits, info.context)


class Body(BaseModel):
    """Or a part of one, in the field `WITHIN`, or in one of its parts ("text.format"), and then with the `SHAPE` that
    those who have it from elsewhere are shown. `REMEDIES` say, by field, what to do instead of what is not served, and
    `CODES` by which code clients know a refusal, where they have one for it."""

    model_config = ConfigDict(strict=True, extra="forbid")
    UNSERVED: ClassVar[Unserved] = {}
    REMEDIES: ClassVar[Mapping[str, str]] = {}
    CODES: ClassVar[Mapping[str, str]] = {}
    WITHIN: ClassVar[str | None] = None
    SHAPE: ClassVar[str] = ""

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_served(cls, body: Any) -> Any:
        """At the first; pydantic would collect an error for each of a hundred thousand."""
        if not isinstance(body, dict):
            if cls.SHAPE and not isinstance(body, cls):
                told = f"in {cls.WITHIN} an object is expected: {cls.SHAPE}"
                raise InvalidRequest(told, param=cls._field(), code="invalid_value")
            return body
        served = cls._served()
        for name, value in body.items():
            if name in served:
                continue
            if name not in cls.UNSERVED:
                raise InvalidRequest(
                    f"{name[:100]!r} is not a field of {cls.WITHIN or 'this request'}"
                    + (f", where {cls.SHAPE} is expected" if cls.SHAPE else ""),
                    param=cls._field() or name[:100],
                    code="unknown_parameter",
                )
            if not asks_for_nothing(value, cls.UNSERVED[name]):
                place = f" in {cls.WITHIN}" if cls.WITHIN else ""
                remedy = f"; {cls.REMEDIES[name]}" if name in cls.REMEDIES else ""
                raise InvalidRequest(
                    f"{name}{place} is not served{remedy}",
                    param=cls._field() or name,
                    code=cls.CODES.get(name, "unsupported_parameter"),
                )
        return {name: value for name, value in body.items() if name in served}

    @classmethod
    def _field(cls) -> str | None:
        """The request's, in which it is."""
        return None if cls.WITHIN is None else cls.WITHIN.partition(".")[0]

    @classmethod
    @cache
    def _served(cls) -> frozenset[str]:
        """Names of fields as requests have them."""
        return frozenset(it.alias or name for name, it in cls.model_fields.items())

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """With the fields that are not served, and the values of theirs that ask for nothing."""
        schema = handler(core_schema)
        own = handler.resolve_ref_schema(schema)
        for name, harmless in cls.UNSERVED.items():
            if name in cls._served():
                continue
            free = [value for place, value in enumerate(harmless) if value not in harmless[:place]]
            said = "Not served; these values ask for nothing."
            own.setdefault("properties", {})[name] = {"description": said, "enum": [None, *free]}
        return schema


def _moderate(metadata: Any) -> Any:
    """Before it is typed: pydantic would collect an error for each value."""
    if isinstance(metadata, dict) and (
        len(metadata) > _MOST_METADATA
        or any(len(key) > _LONGEST_KEY or len(str(value)) > _LONGEST_VALUE for key, value in metadata.items())
    ):
        raise InvalidRequest(
            f"metadata has at most {_MOST_METADATA} keys of {_LONGEST_KEY} characters, with values of {_LONGEST_VALUE}",
            param="metadata",
        )
    return metadata


_METADATA: JsonDict = {
    "maxProperties": _MOST_METADATA,
    "propertyNames": {"maxLength": _LONGEST_KEY},
    "additionalProperties": {"type": "string", "maxLength": _LONGEST_VALUE},
}
Metadata = Annotated[dict[str, str], BeforeValidator(_moderate), Field(json_schema_extra=_METADATA)]


def _nothing_is_stored(store: bool) -> bool:
    """By hand: for Literal[False] a 0 is one too."""
    if store:
        raise InvalidRequest(
            "nothing is stored here; send store: false, or leave it out", param="store", code="invalid_value"
        )
    return store


class Labels(Body):
    """What a request may say about itself. They change nothing about its answer; `user`, or else `safety_identifier`,
    decides to which target of an alias its requests go. Nothing is stored, so only `store: false` can be asked for."""

    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    metadata: Metadata | None = None
    store: Annotated[bool, AfterValidator(_nothing_is_stored), WithJsonSchema({"const": False})] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @property
    def who(self) -> str | None:
        return self.safety_identifier if self.user is None else self.user
