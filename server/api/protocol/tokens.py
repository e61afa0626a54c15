"""The bodies of POST /tokenize and POST /detokenize, with vLLM's names."""

from functools import cached_property
from typing import Annotated, ClassVar, Self

from pydantic import ConfigDict, PlainValidator, ValidationInfo, WithJsonSchema, field_validator, model_validator
from pydantic.config import JsonDict

from server.api.protocol.body import Body, Unserved, limits_of
from server.api.protocol.chat import TemplateKwargs
from server.api.protocol.completions import token_ids
from server.api.protocol.generation import Model
from server.api.protocol.said import Messages, check_continuation, counted
from server.api.protocol.schema import SOMETHING, TOKEN_IDS, given
from server.api.protocol.tools import Choosing, Tools, tools_wanted
from server.api.texts.speech import Tool
from server.errors import InvalidRequest

_NOTHING: JsonDict = {"type": "null"}
_PROMPT: dict[str, JsonDict] = dict(
    prompt=SOMETHING,
    messages=_NOTHING,
    add_generation_prompt=_NOTHING,
    chat_template_kwargs=_NOTHING,
    continue_final_message={"enum": [None, False]},
    tools=_NOTHING,
)
_CHAT: dict[str, JsonDict] = dict(messages=SOMETHING, prompt=_NOTHING, add_special_tokens={"enum": [None, False]})
_RULES: JsonDict = {"oneOf": [{**given(**it), "required": [next(iter(it))]} for it in (_PROMPT, _CHAT)]}


def _tokens(value: object, info: ValidationInfo) -> list[int]:
    return token_ids(value, "tokens", limits_of(info), "tokens")


class TokenizeBody(Body):
    """A text, or a conversation, whose special tokens are written by the chat template; no others are added to it."""

    UNSERVED: ClassVar[Unserved] = {
        "chat_template": (), "mm_processor_kwargs": (),
    }  # fmt: skip

    model_config = ConfigDict(json_schema_extra=_RULES)

    model: Model | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    tools: Tools | None = None
    return_token_strs: bool | None = None

    _count = field_validator("messages", mode="before")(counted)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("send one of prompt and messages", param="prompt", code="invalid_value")
        if self.messages is not None and self.add_special_tokens:
            raise InvalidRequest(
                "add_special_tokens is not served with messages: the chat template writes them",
                param="add_special_tokens",
                code="unsupported_parameter",
            )
        for name in ("add_generation_prompt", "chat_template_kwargs", "tools"):
            if self.prompt is not None and getattr(self, name) is not None:
                raise InvalidRequest(f"{name} says nothing about a prompt; it goes with messages", param=name)
        check_continuation(self.messages, self.continue_final_message, self.add_generation_prompt)
        tools_wanted(self.told_tools, Choosing())
        return self

    @cached_property
    def told_tools(self) -> list[Tool]:
        return [it.function.tool for it in self.tools or ()]


class DetokenizeBody(Body):
    model: Model | None = None
    tokens: Annotated[list[int], PlainValidator(_tokens), WithJsonSchema(TOKEN_IDS)]
