"""GET /openapi.json: what every route says of itself (operation.py), put together, with this server's own limits."""

import asyncio
import inspect
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import msgspec
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.api.operation import operation
from server.api.protocol.schema import filled
from server.api.routes import api_routes
from server.api.service import Service, service_of

router = APIRouter()
_REF = "#/components/schemas/{model}"


@router.get("/openapi.json", openapi_extra=operation({"type": "object"}))
async def openapi(request: Request) -> Response:
    """This document."""
    app = request.app
    if not hasattr(app.state, "openapi"):  # in a thread: pydantic takes a while to say what it knows
        app.state.openapi = await asyncio.to_thread(lambda: msgspec.json.encode(document(app, service_of(request))))
    return Response(app.state.openapi, media_type="application/json")


def document(app: FastAPI, service: Service) -> dict[str, Any]:
    """OpenAPI 3.1. Raises KeyError for a route that says nothing of itself."""
    paths: dict[str, dict[str, Any]] = {}
    for route in api_routes(app.routes):
        for method in sorted(route.methods or ()):
            paths.setdefault(route.path_format, {})[method.lower()] = _operation(route, method)
    models = sorted(set(_classes(paths)), key=lambda it: (it.__name__, it.__module__))
    refs, schemas = models_json_schema([(it, "validation") for it in models], ref_template=_REF)
    ref_of = {model: refs[model, "validation"] for model in models}
    made = {
        "openapi": "3.1.0",
        "info": {"title": app.title, "version": app.version, "summary": app.summary},
        "servers": [{"url": "/"}],
        "paths": _with_refs(paths, ref_of),
        "components": {"schemas": schemas.get("$defs", {})},
    }
    values = asdict(service.body_limits) | {
        "base_name": service.catalog.base_name,
        "hidden_size": service.info.hidden_size,
    }
    told: dict[str, Any] = filled(made, values)
    return told


def _operation(route: APIRoute, method: str) -> dict[str, Any]:
    if route.openapi_extra is None:
        raise KeyError(f"{route.path} does not say what it takes and answers (operation.py)")
    module = route.endpoint.__module__.rpartition(".")[2]
    which = f"_{method.lower()}" if len(route.methods or ()) > 1 else ""
    told = {
        "operationId": f"{module}_{route.name}{which}",
        "tags": [module],
        "summary": f"{method} {route.path_format}",
        "description": inspect.cleandoc(route.endpoint.__doc__ or ""),
        **route.openapi_extra,
    }
    words = told.pop("x-path")
    in_path = [
        {"name": name, "in": "path", "required": True, "schema": words.get(name, {"type": "string", "minLength": 1})}
        for name in route.param_convertors
    ]
    told["parameters"] = [*in_path, *told["parameters"]]
    if method == "HEAD":
        told["responses"] = {
            status: {key: it for key, it in response.items() if key != "content"}
            for status, response in told["responses"].items()
        }
    return told


def _classes(it: Any) -> Iterator[type[BaseModel]]:
    """All that stand somewhere in it."""
    if isinstance(it, type) and issubclass(it, BaseModel):
        yield it
    elif isinstance(it, dict | list):
        for value in it.values() if isinstance(it, dict) else it:
            yield from _classes(value)


def _with_refs(it: Any, ref_of: dict[type[BaseModel], Any]) -> Any:
    if isinstance(it, type):
        return ref_of[it]
    if isinstance(it, dict):
        return {key: _with_refs(value, ref_of) for key, value in it.items()}
    return [_with_refs(value, ref_of) for value in it] if isinstance(it, list) else it
