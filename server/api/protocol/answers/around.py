"""Answers about the server: models, probes, and what other servers' tools read."""

from typing import Literal

from server.api.protocol.answers.answer import Answer


class Model(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class ModelList(Answer):
    object: Literal["list"]
    data: list[Model]


class Health(Answer):
    status: Literal["ok"]


class Unhealthy(Answer):
    status: Literal["engine_dead", "engine_silent", "shutting_down", "overloaded"]
    reason: str = ""


class Version(Answer):
    version: str


class VLLMError(Answer):
    message: str
    type: str
    param: str | None
    code: int


class VLLMRefusal(Answer):
    error: VLLMError


class SGLangAnswer(Answer):
    """`loaded_adapters`: where each came from, by name."""

    success: bool
    error_message: str
    loaded_adapters: dict[str, str]


class DynamoAnswer(Answer):
    status: Literal["success"]
    message: str
    lora_name: str
    lora_id: int


class DynamoList(Answer):
    """`loras`: the number of each, by name."""

    status: Literal["success"]
    loras: dict[str, int]
    count: int


class DynamoRefusal(Answer):
    status: Literal["error"]
    message: str
