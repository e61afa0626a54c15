"""Structured output, as bodies ask for it: OpenAI's `response_format`, vLLM's `structured_outputs`, and the four
fields that vLLM had before. What is made of them is server/grammars' business.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, PlainValidator, WithJsonSchema, field_validator, model_validator
from pydantic.config import JsonDict

from server.api.protocol.body import Body, Unserved, refuse_other_types
from server.api.protocol.json_text import is_deeper, name_of_type, strict_object_in, text_of
from server.api.protocol.schema import NOTHING, SOMETHING, given
from server.errors import InvalidRequest
from server.grammars.limits import MAX_CHOICES, MAX_DEPTH
from server.grammars.source import GrammarSource

NAME_PATTERN = "^[a-zA-Z0-9_-]{1,64}$"
FORMATS = ("text", "json_object", "json_schema")
_WRONG = "invalid_grammar"
_OBJECT: JsonDict = {"type": "object"}
_SCHEMA_OR_TEXT: JsonDict = {"anyOf": [_OBJECT, {"type": "string", "minLength": 1}]}
_CHOICES: JsonDict = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_CHOICES}


def checked_schema(value: Any, param: str) -> dict[str, Any]:
    """A JSON Schema, as far as that is seen at a glance. Raises InvalidRequest."""
    if not isinstance(value, dict):
        raise InvalidRequest(f"the schema in {param} must be a JSON object", param=param, code=_WRONG)
    if "x-guidance" in value:
        told = f"the schema in {param} has x-guidance, which is no keyword of JSON Schema; leave it out"
        raise InvalidRequest(told, param=param, code="unsupported_grammar")
    # before its text is made, and templates go through it, for both of which Python calls itself
    if is_deeper(value, MAX_DEPTH):
        told = f"the schema in {param} has lists or objects more than {MAX_DEPTH} deep"
        raise InvalidRequest(told, param=param, code="unsupported_grammar")
    return value


def schema_source(schema: Mapping[str, Any] | None, param: str) -> GrammarSource:
    """`schema` None: any JSON object. `param`: the field that it came in. Raises InvalidRequest."""
    return GrammarSource("json_schema", text_of({"type": "object"} if schema is None else schema, param, _WRONG), param)


def _schema_or_text(value: Any, param: str) -> dict[str, Any]:
    return checked_schema(strict_object_in(value, param, _WRONG) if isinstance(value, str) else value, param)


def _choices(value: Any, param: str) -> list[str]:
    if not isinstance(value, list) or not value:
        raise InvalidRequest(f"the choice in {param} must be a list of texts", param=param, code=_WRONG)
    if len(value) > MAX_CHOICES:
        told = f"the choice in {param} has {len(value):,} texts; at most {MAX_CHOICES:,} are served"
        raise InvalidRequest(told, param=param, code="unsupported_grammar")
    other = next((index for index, it in enumerate(value) if type(it) is not str), None)
    if other is not None:
        told = f"the choice in {param} must be a list of texts, and item {other} is {name_of_type(value[other])}"
        raise InvalidRequest(told, param=param, code=_WRONG)
    return value


def _choice_source(choices: Sequence[str], param: str) -> GrammarSource:
    return GrammarSource("choice", json.dumps(choices, ensure_ascii=False), param)


class NamedSchema(Body):
    """A schema with a name, as OpenAI has them. `name` and `description` are labels: no model reads them. It is
    followed whatever `strict` says, and what OpenAI asks of a strict one is not asked here."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    description: str | None = None
    schema_: Annotated[dict[str, Any], WithJsonSchema(_OBJECT)] | None = Field(default=None, alias="schema")
    strict: bool | None = None

    @field_validator("schema_", mode="before")
    @classmethod
    def _check_schema(cls, value: Any) -> Any:
        return None if value is None else checked_schema(value, cls._field() or "schema")


class JsonSchemaFormat(NamedSchema):
    WITHIN = "response_format.json_schema"
    SHAPE = '{"name": …, "schema": {…}}'


_FORMAT_RULES: JsonDict = {
    "anyOf": [
        {"properties": {"type": {"enum": ["text", "json_object"]}, "json_schema": NOTHING}},
        given(type={"const": "json_schema"}, json_schema=SOMETHING),
    ]
}


class ResponseFormat(Body):
    WITHIN = "response_format"
    SHAPE = '{"type": "json_schema", "json_schema": {"name": …, "schema": {…}}}'

    model_config = ConfigDict(json_schema_extra=_FORMAT_RULES)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_other_types(cls, it: Any) -> Any:
        refuse_other_types(it, "response_format", FORMATS, "response_format")
        return it

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            told = "needs json_schema" if self.json_schema is None else "has no json_schema"
            raise InvalidRequest(f"response_format of type {self.type!r} {told}", param="response_format",
                                 code="invalid_value")  # fmt: skip
        return self

    @property
    def source(self) -> GrammarSource | None:
        if self.type == "text":
            return None
        return schema_source(None if self.json_schema is None else self.json_schema.schema_, "response_format")


_OUTPUT_RULES: JsonDict = {
    "oneOf": [
        *(given(**{name: SOMETHING}) for name in ("json", "regex", "choice", "grammar")),
        given(json_object={"const": True}),
    ]
}
Pattern = Annotated[str, Field(min_length=1)]


class StructuredOutputs(Body):
    """vLLM's. `grammar` is GBNF or Lark."""

    WITHIN = "structured_outputs"
    SHAPE = '{"json": {…}}, {"regex": …}, {"choice": […]}, {"grammar": …} or {"json_object": true}'
    UNSERVED: ClassVar[Unserved] = {
        "disable_additional_properties": (False,), "disable_any_whitespace": (False,),
        "disable_fallback": (False, True), "structural_tag": (), "whitespace_pattern": (),
    }  # fmt: skip

    model_config = ConfigDict(json_schema_extra=_OUTPUT_RULES)

    json_: Annotated[dict[str, Any], WithJsonSchema(_SCHEMA_OR_TEXT)] | None = Field(default=None, alias="json")
    regex: Pattern | None = None
    choice: Annotated[list[str], WithJsonSchema(_CHOICES)] | None = None
    grammar: Pattern | None = None
    json_object: bool | None = None

    @field_validator("json_", mode="before")
    @classmethod
    def _check_schema(cls, value: Any) -> Any:
        return None if value is None else _schema_or_text(value, "structured_outputs")

    @field_validator("choice", mode="before")
    @classmethod
    def _check_choices(cls, value: Any) -> Any:
        return None if value is None else _choices(value, "structured_outputs")

    @model_validator(mode="after")
    def _check(self) -> Self:
        fields = {"json": self.json_, "regex": self.regex, "choice": self.choice, "grammar": self.grammar}
        said = [name for name, value in fields.items() if value is not None]
        said += ["json_object"] * bool(self.json_object)
        if len(said) != 1:
            told = f"has {' and '.join(said)}" if said else "has none of them"
            raise InvalidRequest(
                f"structured_outputs {told}; send one of json, regex, choice, grammar and json_object: true",
                param="structured_outputs",
                code="invalid_value",
            )
        return self

    @property
    def source(self) -> GrammarSource:
        if self.regex is not None:
            return GrammarSource("regex", self.regex, "structured_outputs")
        if self.choice is not None:
            return _choice_source(self.choice, "structured_outputs")
        if self.grammar is not None:
            return GrammarSource("ebnf", self.grammar, "structured_outputs")
        return schema_source(self.json_, "structured_outputs")


def _guided_json(value: Any) -> dict[str, Any]:
    return _schema_or_text(value, "guided_json")


def _guided_choice(value: Any) -> list[str]:
    return _choices(value, "guided_choice")


class GrammarFields(Body):
    """Of all routes that generate. A route that has a field of its own says in `own_source` what that comes to."""

    structured_outputs: StructuredOutputs | None = None
    guided_json: Annotated[dict[str, Any], PlainValidator(_guided_json), WithJsonSchema(_SCHEMA_OR_TEXT)] | None = None
    guided_regex: Pattern | None = None
    guided_choice: Annotated[list[str], PlainValidator(_guided_choice), WithJsonSchema(_CHOICES)] | None = None
    guided_grammar: Pattern | None = None

    @property
    def own_source(self) -> GrammarSource | None:
        return None

    @cached_property
    def source(self) -> GrammarSource | None:
        """Raises InvalidRequest if there are two."""
        said = [self.own_source] if self.own_source is not None else []
        if self.structured_outputs is not None:
            said.append(self.structured_outputs.source)
        if self.guided_json is not None:
            said.append(schema_source(self.guided_json, "guided_json"))
        if self.guided_regex is not None:
            said.append(GrammarSource("regex", self.guided_regex, "guided_regex"))
        if self.guided_choice is not None:
            said.append(_choice_source(self.guided_choice, "guided_choice"))
        if self.guided_grammar is not None:
            said.append(GrammarSource("ebnf", self.guided_grammar, "guided_grammar"))
        if len(said) > 1:
            raise InvalidRequest(
                f"{said[0].param} and {said[1].param} each bring a grammar; send one of them",
                param=said[1].param,
                code="invalid_value",
            )
        return said[0] if said else None

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        _ = self.source
        return self
