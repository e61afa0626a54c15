"""What a route takes and answers, said on its decorator: `openapi_extra=operation(...)`.

It is an OpenAPI operation in which classes stand for their schemas and limits for the server's numbers, until
openapi.py fills them in. Statuses that any route may answer with (COMMON) are added here.
"""

from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any, NamedTuple

from server.api.protocol.answers.answer import ErrorAnswer

Schema = type | dict[str, Any]  # a class stands for its own
Content = Mapping[str, Schema]  # by media type
JSON, TEXT, EVENTS = "application/json", "text/plain", "text/event-stream"
FORM, BYTES = "multipart/form-data", "application/octet-stream"
# the head or the body is malformed, slow, too large, compressed or too much; or there is no room, or no engine
COMMON = (400, 408, 413, 415, 431, 503)
RETRY_AFTER = {"Retry-After": {"description": "seconds", "required": True, "schema": {"type": "string"}}}


class Answered(NamedTuple):
    """What comes with one status. `headers`: always there."""

    content: Content = {}
    headers: tuple[str, ...] = ()


def operation(
    answers: Schema | Mapping[int, Answered | Schema],
    *,
    takes: type | Content | None = None,
    may_be_empty: bool = False,
    refuses: Iterable[int] = (),
    refusal: Schema = ErrorAnswer,
    query: Mapping[str, dict[str, Any]] | None = None,
    headers: Mapping[str, dict[str, Any]] | None = None,
    path: Mapping[str, Mapping[str, Any]] | None = None,
    leads_to: Mapping[str, Mapping[str, str]] | None = None,
) -> dict[str, Any]:
    """`answers`: of status 200, or by status. `takes`: JSON, or by media type. `refuses`: statuses beside the COMMON
    ones, with a body that is a `refusal`; what is refused before a route is reached has OpenAI's shape everywhere.
    `path`: what its words are, if not any text. `leads_to`: by operation id, which of its parameters are where in the
    answer."""
    is_by_status = isinstance(answers, dict) and all(isinstance(key, int) for key in answers)
    by_status: dict[int, Any] = answers if is_by_status else {200: answers}  # type: ignore[assignment]
    parameters = [_parameter("query", *it) for it in (query or {}).items()]
    parameters += [_parameter("header", *it) for it in (headers or {}).items()]
    told: dict[str, Any] = {"parameters": parameters, "responses": {}, "x-path": path or {}}
    if takes is not None:
        content: Any = {JSON: takes} if isinstance(takes, type) else takes
        told["requestBody"] = {"required": not may_be_empty, "content": _content(content)}
    for status in sorted({*COMMON, *refuses, *by_status}):
        told["responses"][str(status)] = _response(status, by_status.get(status), refusal)
        if status < 300 and leads_to is not None:
            told["responses"][str(status)]["links"] = {it: _link(it, where) for it, where in leads_to.items()}
    return told


def streamed(whole: Schema, chunk: type, ending: str | None = "[DONE]", error: type = ErrorAnswer) -> Answered:
    """One body, or with `stream` events of chunks, of which the last is the `ending`. None: each event has the name of
    its type, and there is no ending but the last of them."""
    own = {"type": "string", "contentMediaType": JSON, "contentSchema": {"anyOf": [chunk, error]}}
    data = {
        "description": "A chunk; an error, with which a stream ends that fails; or what ends one that is whole.",
        "anyOf": [own, *([] if ending is None else [{"const": ending}])],
    }
    events = {
        "type": "object",
        "description": "One event. Lines that begin with a colon are comments, which keep the connection alive.",
        "properties": {"event": {"type": "string"}, "data": data},
        "required": ["data"],
    }
    return Answered({JSON: whole, EVENTS: events})


def _parameter(place: str, name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """`required` and `description` are the parameter's own; all else is its schema's."""
    own: dict[str, Any] = {key: schema[key] for key in ("required", "description") if key in schema}
    return {"name": name, "in": place, **own, "schema": {key: it for key, it in schema.items() if key not in own}}


def _link(operation_id: str, where: Mapping[str, str]) -> dict[str, Any]:
    return {
        "operationId": operation_id,
        "parameters": {name: f"$response.body#{pointer}" for name, pointer in where.items()},
    }


def _content(content: Content) -> dict[str, Any]:
    return {media: {"schema": schema} for media, schema in content.items()}


def _response(status: int, answer: Answered | Schema | None, refusal: Schema) -> dict[str, Any]:
    own = answer if isinstance(answer, Answered) else Answered() if answer is None else Answered({JSON: answer})
    content: dict[str, Any] = dict(own.content)
    if status >= 400:
        kinds = [
            content.get(JSON, refusal),
            *([ErrorAnswer] if status in (*COMMON, 404) else []),
        ]  # 404: a path may hold what no route takes
        content[JSON] = kinds[0] if kinds[-1] is kinds[0] else {"anyOf": kinds}
    told: dict[str, Any] = {"description": HTTPStatus(status).phrase}
    headers: dict[str, Any] = {name: {"required": True, "schema": {"type": "string"}} for name in own.headers}
    if status == 503 and answer is None:
        headers = RETRY_AFTER
    if headers:
        told["headers"] = headers
    return told | ({"content": _content(content)} if content else {})
