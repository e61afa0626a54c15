"""Adapters while others decode: POST, GET and DELETE /v1/adapters."""

import asyncio
import logging

from fastapi import APIRouter, Request, Response

from adapters_store.catalog import CatalogEntry
from adapters_store.errors import UnsupportedAdapter
from adapters_store.parts import ExpertReplacement, LowRank, describe
from server.api.errors import respond
from server.api.protocol import AdapterBody
from server.api.service import Service, service_of

log = logging.getLogger("heddle.adapters")
router = APIRouter()


@router.post("/v1/adapters")
async def add(body: AdapterBody, request: Request) -> Response:
    """Verify the adapter and give it a name: 201, or 200 if the name already meant these very weights.

    Its weights travel to the device when a request first asks for it.
    """
    service = service_of(request)
    entry = await asyncio.to_thread(service.catalog.read, body.name, body.path)  # reads every byte
    check_room(entry, service)
    is_new = register(entry, service)
    return respond(201 if is_new else 200, _adapter(entry, service))


@router.get("/v1/adapters")
async def list_all(request: Request) -> Response:
    service = service_of(request)
    return respond(200, {"object": "list", "data": [_adapter(entry, service) for entry in service.catalog]})


@router.get("/v1/adapters/{name}")
async def get_one(name: str, request: Request) -> Response:
    service = service_of(request)
    entry = service.catalog.get(name)
    return respond(200, _adapter(entry, service) | describe(entry.package))


@router.delete("/v1/adapters/{name}")
async def delete(name: str, request: Request) -> Response:
    """New requests no longer find it; those under way finish on its weights, which leave the device after them."""
    service = service_of(request)
    entry = service.catalog.remove(name)
    service.client.remove_adapter(entry.ref)
    service.metrics.forget_model(name)
    return respond(200, {"id": name, "object": "adapter", "deleted": True})


def register(entry: CatalogEntry, service: Service) -> bool:
    is_new = service.catalog.add(entry)
    if (warning := _graph_warning(entry, service)) is not None:
        log.warning("the adapter %r: %s", entry.ref.name, warning)
    service.client.add_adapter(entry.ref, entry.package)  # known or not: its files may be elsewhere now
    return is_new


def check_room(entry: CatalogEntry, service: Service) -> None:
    """Refuse what could never be on the device. Raises UnsupportedAdapter with the numbers."""
    needed = entry.package.num_elements * (4 if service.info.dtype == "float32" else 2)
    if needed > service.info.adapter_bytes:
        raise UnsupportedAdapter(
            f"the adapter needs {needed:,} bytes; all adapters together may use {service.info.adapter_bytes:,}"
        )
    e_max = service.info.max_experts_per_adapter
    by_layer: dict[int, int] = {}
    for part in entry.package.parts:
        if isinstance(part, ExpertReplacement):
            by_layer[part.layer] = by_layer.get(part.layer, 0) + 1
    for layer, count in by_layer.items():
        if count > e_max:
            raise UnsupportedAdapter(
                f"the adapter tunes {count} experts of layer {layer}; this server has room for {e_max} "
                "(--max-experts-per-adapter)"
            )


def _graph_warning(entry: CatalogEntry, service: Service) -> str | None:
    """What a LoRA of a higher rank than decodes were captured for costs, if this is one."""
    limit = service.info.graph_rank
    rank = max((part.rank for part in entry.package.parts if isinstance(part, LowRank)), default=0)
    if limit is None or rank <= limit:
        return None
    return (
        f"its rank {rank} is above {limit}, the highest that decodes are captured for: every step with one of its "
        f"requests launches its kernels one by one, and the requests beside it wait too; --max-rank {rank} captures it"
    )


def _adapter(entry: CatalogEntry, service: Service) -> dict[str, object]:
    on_device = next((it for it in service.client.stats.adapters if it.ref == entry.ref), None)
    return {
        "id": entry.ref.name,
        "object": "adapter",
        "kind": entry.ref.kind,
        "revision": entry.ref.revision,
        "root": entry.root,
        "parent": service.catalog.base_name,
        "created": entry.created,
        "bytes": entry.package.file_bytes,
        "warnings": [warning for warning in (_graph_warning(entry, service),) if warning is not None],
        "device": {
            "state": on_device.state if on_device else "absent",
            "bytes": on_device.bytes if on_device else 0,
            "running_requests": on_device.pins if on_device else 0,
        },
    }
