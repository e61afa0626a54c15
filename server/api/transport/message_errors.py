"""Errors as Anthropic's clients know them, on the routes that are Anthropic's."""

import re
import uuid
from collections.abc import Mapping, MutableMapping
from typing import Any

from server.api.protocol.messages import NO_THREADS

_KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 504: "timeout_error",
}  # fmt: skip
# what an error of ours says of itself where no status can be sent any more
_STATUSES = {"rate_limit_error": 429, "internal_error": 500, "service_unavailable": 503, "timeout": 504}
_TEMPORARY = ("overloaded", "shutting_down")  # of the codes of status 503: others may do better a moment later


def are_spoken_at(path: str) -> bool:
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def request_id(scope: MutableMapping[str, Any]) -> str:
    """The same one whenever it is asked for while a request is answered."""
    known: str = scope.setdefault("heddle.request_id", f"req_{uuid.uuid4().hex}")
    return known


def worded(body: Mapping[str, object], request_id: str, status: int | None = None) -> dict[str, object]:
    """Of an error body in OpenAI's shape. `status` None: the answer has begun."""
    error: Any = body["error"]
    if status is None:
        status = 404 if error["code"] == "adapter_deleted" else _STATUSES.get(error["type"], 400)
    if status == 503 and error["code"] in _TEMPORARY:
        kind = "overloaded_error"
    else:
        kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "api_error")
    message, param = error["message"], error["param"]
    if param and not re.search(rf"\b{re.escape(param)}\b", message):  # there is no other place for it
        message = f"{param}: {message}"
    told: dict[str, object] = {"type": kind, "message": message}
    if error["code"] == NO_THREADS:
        told["details"] = {"error_code": NO_THREADS, "unsupported": [param]}
    return {"type": "error", "error": told, "request_id": request_id}
