"""/openapi.json: every route is in it and nothing else, its schemas are schemas, and it knows what bodies know."""

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import jsonschema_rs
import pytest
from fastapi import APIRouter, FastAPI, Request, Response

from server.api.app import create_app
from server.api.openapi import api_routes, document
from server.api.protocol.adapters import AdapterBody, AliasBody
from server.api.protocol.chat import ChatBody
from server.api.protocol.completions import CompletionBody
from server.api.protocol.embeddings import EmbeddingBody
from server.api.protocol.messages import MessageBody
from server.api.protocol.responses import LOGPROBS, ResponseBody
from server.api.protocol.tokens import DetokenizeBody, TokenizeBody
from server.api.service import Service
from server.api.transport.bodies import validated
from server.config import EngineConfig, ServerConfig
from server.errors import InvalidRequest

MESSAGES = [{"role": "user", "content": "x"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
MADE = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLS = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [MADE]}]
RESULT = {"role": "tool", "tool_call_id": "1", "content": "x"}
FLAT = {"type": "function", "name": "f", "parameters": {"type": "object"}}
CALL = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
INPUT_TEXT = {"type": "input_text", "text": "x"}
OUTPUT = {"type": "function_call_output", "call_id": "1", "output": "x"}
REASONING = {"type": "reasoning", "id": "1", "summary": [], "content": [{"type": "reasoning_text", "text": "x"}]}
FORMAT = {"type": "json_schema", "schema": {}}
CLAUDES = {"name": "f", "input_schema": {"type": "object"}}
USED = {"role": "assistant", "content": [{"type": "thinking", "thinking": "x", "signature": ""},
                                         {"type": "tool_use", "id": "1", "name": "f", "input": {}}]}  # fmt: skip
ANSWERED = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "x"}]}


def formed(**fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": fields}}


def user(**fields: Any) -> dict[str, Any]:
    return {"messages": [MESSAGES[0] | fields]}


FILE = {"type": "text", "text": "x"}


@pytest.fixture(scope="module")
def service() -> Service:
    unused: Any = SimpleNamespace(limits=SimpleNamespace(max_upload_bytes=1))
    info: Any = SimpleNamespace(max_model_len=32, vocab_size=16, hidden_size=8)
    lifecycle: Any = SimpleNamespace(catalog=SimpleNamespace(base_name="tiny"))
    config = ServerConfig(EngineConfig("."), max_prompts=2, max_n=3, max_stop=4)
    return Service(config, info, unused, lifecycle, unused, unused, unused, unused, grammars=unused, started=0)


@pytest.fixture(scope="module")
def app(service: Service) -> FastAPI:
    return create_app(service)


@pytest.fixture(scope="module")
def told(app: FastAPI, service: Service) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(json.dumps(document(app, service)))
    return made


def operations(told: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in told["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def test_it_has_every_route_and_no_other(app: FastAPI, told: dict[str, Any]) -> None:
    served = {(method.lower(), it.path_format) for it in api_routes(app.routes) for method in it.methods or ()}
    assert {(method, path) for method, path, _ in operations(told)} == served
    ids = [operation["operationId"] for _, _, operation in operations(told)]
    assert len(ids) == len(set(ids)) == len(served) > 40


def test_a_route_that_says_nothing_cannot_be_forgotten(service: Service) -> None:
    app, router = create_app(service), APIRouter()

    @router.get("/silent")
    async def silent(request: Request) -> Response:
        return Response()

    app.include_router(router)
    with pytest.raises(KeyError, match="/silent does not say what it takes and answers"):
        document(app, service)
    mounted = create_app(service)
    mounted.mount("/other", FastAPI())
    with pytest.raises(KeyError, match="is no route"):
        document(mounted, service)


def test_every_schema_is_one_and_every_reference_leads_somewhere(told: dict[str, Any]) -> None:
    known = set(told["components"]["schemas"])

    def walk(it: Any) -> None:
        if isinstance(it, dict):
            if "$ref" in it:
                assert it["$ref"].removeprefix("#/components/schemas/") in known
            for value in it.values():
                walk(value)
        elif isinstance(it, list):
            for value in it:
                walk(value)

    walk(told)
    for schema in told["components"]["schemas"].values():
        jsonschema_rs.meta.validate({"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema)


def test_every_path_parameter_and_every_way_to_fail_is_told(told: dict[str, Any]) -> None:
    for method, path, operation in operations(told):
        words = {it["name"] for it in operation["parameters"] if it["in"] == "path"}
        assert words == {part[1:-1] for part in path.split("/") if part.startswith("{")}
        assert {"400", "408", "413", "415", "431", "503"} < set(operation["responses"])
        assert min(operation["responses"]) < "3" or path.startswith("/v1/responses/")  # where nothing is stored
        for status, response in operation["responses"].items():
            assert ("content" in response) == (method != "head" and status != "204"), (path, status)


def test_the_schemas_are_this_servers(told: dict[str, Any]) -> None:
    fields = told["components"]["schemas"]["CompletionBody"]["properties"]
    assert fields["model"]["examples"] == ["tiny"] and fields["n"]["maximum"] == 3
    assert fields["prompt"]["anyOf"][1]["items"]["exclusiveMaximum"] == 16
    assert fields["suffix"] == {"description": "Not served; these values ask for nothing.", "enum": [None, ""]}
    assert told["components"]["schemas"]["EmbeddingBody"]["properties"]["dimensions"]["maximum"] == 8


@pytest.mark.slow
def test_it_is_served(http: httpx.Client) -> None:
    response = http.get("/openapi.json")
    assert response.headers["content-type"] == "application/json" and response.json()["openapi"] == "3.1.0"
    assert response.content == http.get("/openapi.json").content


COMPLETION = {"model": "x", "prompt": "x"}
CHAT = {"model": "x", "messages": MESSAGES}
EMBEDDING = {"model": "x", "input": "x"}


@pytest.mark.parametrize(
    ("kind", "body", "is_taken"),
    [
        (CompletionBody, COMPLETION, True),
        (CompletionBody, {"model": "x"}, False),
        (CompletionBody, COMPLETION | {"prompt": ["x", "x"]}, True),
        (CompletionBody, COMPLETION | {"prompt": ["x"] * 3}, False),
        (CompletionBody, COMPLETION | {"prompt": []}, False),
        (CompletionBody, COMPLETION | {"prompt": [15, 0]}, True),
        (CompletionBody, COMPLETION | {"prompt": [16]}, False),
        (CompletionBody, COMPLETION | {"prompt": [-1]}, False),
        (CompletionBody, COMPLETION | {"prompt": [1] * 33}, False),
        (CompletionBody, COMPLETION | {"prompt": [[1], [2]]}, True),
        (CompletionBody, COMPLETION | {"prompt": ["x", [2]]}, False),
        (CompletionBody, COMPLETION | {"prompt": None}, False),
        (CompletionBody, COMPLETION | {"n": 3}, True),
        (CompletionBody, COMPLETION | {"n": 4}, False),
        (CompletionBody, COMPLETION | {"n": True}, False),
        (CompletionBody, COMPLETION | {"best_of": 4}, False),
        (CompletionBody, COMPLETION | {"temperature": 2}, True),
        (CompletionBody, COMPLETION | {"temperature": 2.1}, False),
        (CompletionBody, COMPLETION | {"top_p": 0}, False),
        (CompletionBody, COMPLETION | {"logit_bias": {"15": -100, "0": 100.0}}, True),
        (CompletionBody, COMPLETION | {"logit_bias": {"x": 1}}, False),
        (CompletionBody, COMPLETION | {"logit_bias": {"1": 101}}, False),
        (CompletionBody, COMPLETION | {"logit_bias": {"1": None}}, False),
        (CompletionBody, COMPLETION | {"logit_bias": None}, True),
        (CompletionBody, COMPLETION | {"stop_token_ids": [15]}, True),
        (CompletionBody, COMPLETION | {"stop_token_ids": [16]}, False),
        (CompletionBody, COMPLETION | {"stop_token_ids": [1] * 257}, False),
        (CompletionBody, COMPLETION | {"stop": "x"}, True),
        (CompletionBody, COMPLETION | {"stop": ""}, False),
        (CompletionBody, COMPLETION | {"stop": ["x"] * 4}, True),
        (CompletionBody, COMPLETION | {"stop": ["x"] * 5}, False),
        (CompletionBody, COMPLETION | {"stop": ["x" * 1025]}, False),
        (CompletionBody, COMPLETION | {"logprobs": 20}, True),
        (CompletionBody, COMPLETION | {"logprobs": 21}, False),
        (CompletionBody, COMPLETION | {"logprobs": -1}, False),
        (CompletionBody, COMPLETION | {"max_tokens": 0}, False),
        (CompletionBody, COMPLETION | {"max_tokens": 0, "echo": True}, True),
        (CompletionBody, COMPLETION | {"max_tokens": 0, "prompt_logprobs": 0}, True),
        (CompletionBody, COMPLETION | {"stream_options": {}}, False),
        (CompletionBody, COMPLETION | {"stream_options": {"include_usage": True}, "stream": True}, True),
        (CompletionBody, COMPLETION | {"stream_options": None}, True),
        (CompletionBody, COMPLETION | {"prompt_logprobs": 1, "stream": True}, False),
        (CompletionBody, COMPLETION | {"suffix": ""}, True),
        (CompletionBody, COMPLETION | {"suffix": "x"}, False),
        (CompletionBody, COMPLETION | {"use_beam_search": False}, True),
        (CompletionBody, COMPLETION | {"use_beam_search": True}, False),
        (CompletionBody, COMPLETION | {"length_penalty": 1.0}, True),
        (CompletionBody, COMPLETION | {"unknown": None}, False),
        (CompletionBody, COMPLETION | {"metadata": {"k" * 64: "v" * 512}}, True),
        (CompletionBody, COMPLETION | {"metadata": {"k" * 65: "v"}}, False),
        (CompletionBody, COMPLETION | {"metadata": {"k": "v" * 513}}, False),
        (CompletionBody, COMPLETION | {"metadata": {"k": 1}}, False),
        (CompletionBody, COMPLETION | {"metadata": {str(number): "" for number in range(17)}}, False),
        (CompletionBody, COMPLETION | {"store": True}, False),
        (ChatBody, CHAT, True),
        (ChatBody, CHAT | {"messages": []}, False),
        (ChatBody, CHAT | {"messages": [{"role": "user", "content": [FILE]}]}, True),
        (ChatBody, CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, False),
        (ChatBody, CHAT | {"messages": [{"role": "assistant", "content": "x", "tool_calls": []}]}, True),
        (ChatBody, CHAT | {"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}, False),
        (ChatBody, CHAT | {"messages": [{"role": "x", "content": "x"}]}, False),
        (ChatBody, CHAT | {"max_tokens": 1, "max_completion_tokens": 1}, False),
        (ChatBody, CHAT | {"top_logprobs": 1}, False),
        (ChatBody, CHAT | {"top_logprobs": 0}, True),
        (ChatBody, CHAT | {"top_logprobs": 1, "logprobs": True}, True),
        (ChatBody, CHAT | {"chat_template_kwargs": {"x": {"y": [1]}}}, True),
        (ChatBody, CHAT | {"chat_template_kwargs": {"messages": []}}, False),
        (ChatBody, CHAT | {"chat_template_kwargs": {str(number): 1 for number in range(65)}}, False),
        (ChatBody, CHAT | {"chat_template_kwargs": []}, False),
        (ChatBody, CHAT | {"tools": []}, True),
        (ChatBody, CHAT | {"tools": [{}]}, False),
        (ChatBody, CHAT | {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}, True),
        (ChatBody, CHAT | {"tools": [TOOL], "tool_choice": "any"}, False),
        (ChatBody, CHAT | {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}}, True),
        (ChatBody, CHAT | {"tools": [TOOL], "tool_choice": {"type": "function", "name": "f"}}, False),
        (ChatBody, CHAT | {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "allowed_tools": {
            "mode": "auto", "tools": [{"type": "function", "function": {"name": "f"}}]}}}, True),
        (ChatBody, CHAT | {"tools": [{"type": "custom"}]}, False),
        (ChatBody, CHAT | {"tools": [{"type": "function", "function": {"name": "a b"}}]}, False),
        (ChatBody, CHAT | {"tools": [TOOL] * 129}, False),
        (ChatBody, CHAT | {"messages": [*CALLS, RESULT]}, True),
        (ChatBody, CHAT | {"messages": [*CALLS, RESULT | {"tool_call_id": ""}]}, False),
        (ChatBody, CHAT | {"messages": [*CALLS, {"role": "tool", "content": "x"}]}, False),
        (ChatBody, CHAT | {"messages": [*CALLS, RESULT | {"content": None}]}, False),
        (ChatBody, CHAT | {"messages": [{"role": "assistant", "content": None}]}, False),
        (ChatBody, CHAT | {"messages": [{"role": "assistant"}]}, False),
        (ChatBody, CHAT | {"messages": [{"role": "assistant", "content": "x", "reasoning_content": "y"}]}, True),
        (ChatBody, CHAT | user(reasoning_content="y"), False),
        (ChatBody, CHAT | user(reasoning_content=""), True),
        (ChatBody, CHAT | user(reasoning_content=None, name="", tool_calls=[], tool_call_id=None), True),
        (ChatBody, CHAT | user(name="y"), False),
        (ChatBody, CHAT | user(tool_calls=[MADE]), False),
        (ChatBody, CHAT | user(parsed={"a": 1}), False),
        (ChatBody, CHAT | {"response_format": {"type": "text"}}, True),
        (ChatBody, CHAT | {"response_format": {"type": "json_object"}, "include_reasoning": False}, True),
        (ChatBody, CHAT | {"response_format": {"type": "structural_tag"}}, False),
        (ChatBody, CHAT | {"response_format": {"type": "json_schema"}}, False),
        (ChatBody, CHAT | {"response_format": {"type": "text", "json_schema": {"name": "x"}}}, False),
        (ChatBody, CHAT | formed(name="x", schema={}), True),
        (ChatBody, CHAT | formed(name="x", schema=[]), False),
        (ChatBody, CHAT | formed(name="x y"), False),
        (ChatBody, CHAT | formed(schema={}), False),
        (CompletionBody, COMPLETION | formed(name="x"), True),
        (CompletionBody, COMPLETION | {"structured_outputs": {"json": {}}}, True),
        (CompletionBody, COMPLETION | {"structured_outputs": {"json": "{}", "regex": None}}, True),
        (CompletionBody, COMPLETION | {"structured_outputs": {"json_object": True}}, True),
        (CompletionBody, COMPLETION | {"structured_outputs": {"json_object": False}}, False),
        (CompletionBody, COMPLETION | {"structured_outputs": {}}, False),
        (CompletionBody, COMPLETION | {"structured_outputs": {"regex": "x", "choice": ["x"]}}, False),
        (CompletionBody, COMPLETION | {"structured_outputs": {"regex": "x", "structural_tag": "x"}}, False),
        (CompletionBody, COMPLETION | {"guided_choice": ["x"]}, True),
        (CompletionBody, COMPLETION | {"guided_choice": []}, False),
        (CompletionBody, COMPLETION | {"guided_choice": [1]}, False),
        (CompletionBody, COMPLETION | {"guided_regex": ""}, False),
        (CompletionBody, COMPLETION | {"guided_json": {"type": "object"}}, True),
        (CompletionBody, COMPLETION | {"guided_json": 5}, False),
        (CompletionBody, COMPLETION | {"store": 0}, False),
        (CompletionBody, COMPLETION | {"repetition_penalty": 1e-9}, False),
        (ResponseBody, EMBEDDING, True),
        (ResponseBody, EMBEDDING | {"input": [{"role": "user", "content": "x"}]}, True),
        (ResponseBody, EMBEDDING | {"input": []}, False),
        (ResponseBody, EMBEDDING | {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, False),
        (ResponseBody, EMBEDDING | {"store": True}, False),
        (ResponseBody, EMBEDDING | {"store": False}, True),
        (ResponseBody, EMBEDDING | {"top_logprobs": 1}, False),
        (ResponseBody, EMBEDDING | {"top_logprobs": 1, "include": [LOGPROBS]}, True),
        (ResponseBody, EMBEDDING | {"include": ["x"]}, False),
        (ResponseBody, EMBEDDING | {"stream_options": {}}, False),
        (ResponseBody, EMBEDDING | {"previous_response_id": "x"}, False),
        (ResponseBody, EMBEDDING | {"input": [*MESSAGES, CALL, OUTPUT, REASONING]}, True),
        (ResponseBody, EMBEDDING | {"input": [*MESSAGES, CALL, OUTPUT | {"output": [INPUT_TEXT]}]}, True),
        (ResponseBody, EMBEDDING | {"input": [*MESSAGES, CALL, OUTPUT | {"output": [{"type": "input_image"}]}]}, False),
        (ResponseBody, EMBEDDING | {"input": [*MESSAGES, CALL | {"call_id": ""}]}, False),
        (ResponseBody, EMBEDDING | {"input": [*MESSAGES, CALL | {"type": "custom_tool_call"}]}, False),
        (ResponseBody, EMBEDDING | {"input": [*MESSAGES, REASONING | {"encrypted_content": "x"}]}, False),
        (ResponseBody, EMBEDDING | {"tools": [FLAT], "tool_choice": "required", "max_tool_calls": 1}, True),
        (ResponseBody, EMBEDDING | {"tools": [FLAT], "tool_choice": {"type": "function", "name": "f"}}, True),
        (ResponseBody, EMBEDDING | {"tools": [FLAT], "tool_choice": {
            "type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]}}, True),
        (ResponseBody, EMBEDDING | {"tools": [FLAT], "tool_choice": {"type": "web_search"}}, False),
        (ResponseBody, EMBEDDING | {"tools": [TOOL]}, False),
        (ResponseBody, EMBEDDING | {"tools": [FLAT | {"defer_loading": True}]}, False),
        (ResponseBody, EMBEDDING | {"text": {"format": {"type": "json_object"}}}, True),
        (ResponseBody, EMBEDDING | {"text": {"format": {"type": "json_schema", "name": "x", "schema": {}}}}, True),
        (ResponseBody, EMBEDDING | {"text": {"format": {"type": "json_schema", "name": "x"}}}, False),
        (ResponseBody, EMBEDDING | {"text": {"format": {"type": "json_object", "schema": {}}}}, False),
        (MessageBody, CHAT | {"max_tokens": 1}, True),
        (MessageBody, CHAT, False),
        (MessageBody, CHAT | {"max_tokens": 1, "system": [{"type": "text", "text": "x"}]}, True),
        (MessageBody, CHAT | {"max_tokens": 1, "system": [{"type": "image"}]}, False),
        (MessageBody, CHAT | {"max_tokens": 1, "temperature": 1.1}, False),
        (MessageBody, CHAT | {"max_tokens": 1, "stop_sequences": [""]}, False),
        (MessageBody, CHAT | {"max_tokens": 1, "thinking": {"type": "disabled"}}, True),
        (MessageBody, CHAT | {"max_tokens": 1, "tools": [{}]}, False),
        (MessageBody, CHAT | {"max_tokens": 1, "tools": [CLAUDES], "tool_choice": {"type": "tool", "name": "f"}}, True),
        (MessageBody, CHAT | {"max_tokens": 1, "tools": [CLAUDES], "tool_choice": {"type": "tool"}}, False),
        (MessageBody, CHAT | {"max_tokens": 1, "tools": [CLAUDES], "tool_choice": {"type": "any", "name": "f"}}, False),
        (MessageBody, CHAT | {"max_tokens": 1, "tools": [CLAUDES], "tool_choice": {
            "type": "none", "disable_parallel_tool_use": True}}, False),
        (MessageBody, CHAT | {"max_tokens": 1, "tools": [CLAUDES | {"type": "bash_20250124"}]}, False),
        (MessageBody, {"model": "x", "max_tokens": 1, "messages": [USED, ANSWERED]}, True),
        (MessageBody, {"model": "x", "max_tokens": 1, "messages": [USED | {"role": "user"}]}, False),
        (MessageBody, {"model": "x", "max_tokens": 1, "messages": [ANSWERED | {"role": "assistant"}]}, False),
        (MessageBody, CHAT | {"max_tokens": 1, "output_config": {"format": FORMAT}}, True),
        (MessageBody, CHAT | {"max_tokens": 1, "output_config": {"format": {"type": "json_schema"}}}, False),
        (MessageBody, CHAT | {"max_tokens": 1, "output_config": {"effort": "max"}}, False),
        (MessageBody, CHAT | {"max_tokens": 1, "output_format": FORMAT, "output_config": {"effort": None}}, True),
        (MessageBody, CHAT | {"max_tokens": 1, "output_format": FORMAT, "output_config": {"format": FORMAT}}, False),
        (MessageBody, CHAT | {"max_tokens": 1, "thinking": {"type": "enabled", "budget_tokens": 1}}, True),
        (MessageBody, CHAT | {"max_tokens": 1, "thinking": {"type": "adaptive", "budget_tokens": 1}}, False),
        (MessageBody, CHAT | {"max_tokens": 1, "thinking": {"type": "adaptive", "display": "omitted"}}, False),
        (MessageBody, CHAT | {"max_tokens": 1, "thread": {"type": "create"}}, False),
        (EmbeddingBody, EMBEDDING | {"input": [[1], [2]], "pooling": "last", "normalize": False}, True),
        (EmbeddingBody, EMBEDDING | {"encoding_format": "int8"}, False),
        (TokenizeBody, {"prompt": "x"}, True),
        (TokenizeBody, {"messages": MESSAGES, "add_generation_prompt": True}, True),
        (TokenizeBody, {"messages": MESSAGES, "tools": [TOOL]}, True),
        (TokenizeBody, {"prompt": "x", "tools": [TOOL]}, False),
        (TokenizeBody, {}, False),
        (TokenizeBody, {"prompt": "x", "messages": MESSAGES}, False),
        (TokenizeBody, {"prompt": "x", "messages": None}, True),
        (TokenizeBody, {"prompt": "x", "add_generation_prompt": True}, False),
        (TokenizeBody, {"messages": MESSAGES, "add_special_tokens": True}, False),
        (DetokenizeBody, {"tokens": [15]}, True),
        (DetokenizeBody, {"tokens": [16]}, False),
        (DetokenizeBody, {"tokens": ["x"]}, False),
        (AliasBody, {"targets": [{"model": "x", "weight": 0}]}, True),
        (AliasBody, {"targets": [{"model": "x", "weight": -1}]}, False),
        (AdapterBody, {"path": "x"}, True),
    ],
)  # fmt: skip
def test_a_schema_takes_what_its_body_takes(
    told: dict[str, Any], service: Service, kind: Any, body: dict[str, Any], is_taken: bool
) -> None:
    schema = {"$ref": f"#/components/schemas/{kind.__name__}", "components": told["components"]}
    assert jsonschema_rs.Draft202012Validator(schema).is_valid(body) == is_taken
    try:
        validated(kind, body, service.body_limits)
    except InvalidRequest:
        assert not is_taken
    else:
        assert is_taken
