"""GET /v1/models: the base, and every adapter with the base as its parent."""

from fastapi import APIRouter, Request, Response

from adapters_store.catalog import CatalogEntry
from server.api.errors import respond
from server.api.service import Service, service_of

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    service = service_of(request)
    return respond(
        200, {"object": "list", "data": [_base(service), *(_adapter(it, service) for it in service.catalog)]}
    )


@router.get("/v1/models/{model:path}")
async def get_model(model: str, request: Request) -> Response:
    service = service_of(request)
    is_base = service.adapter_for(model) is None
    return respond(200, _base(service) if is_base else _adapter(service.catalog.get(model), service))


def _base(service: Service) -> dict[str, object]:
    name = service.catalog.base_name
    return {"id": name, "object": "model", "created": service.started, "owned_by": "heddle", "root": name,
            "parent": None, "max_model_len": service.info.max_model_len}  # fmt: skip


def _adapter(entry: CatalogEntry, service: Service) -> dict[str, object]:
    return {"id": entry.ref.name, "object": "model", "created": entry.created, "owned_by": "heddle",
            "root": entry.root, "parent": service.catalog.base_name,
            "max_model_len": service.info.max_model_len}  # fmt: skip
