"""Adapters while others decode: POST, GET and DELETE /v1/adapters."""

import logging
from collections.abc import Mapping, Sequence

from fastapi import APIRouter, Request, Response

from adapters_store.catalog import CatalogEntry, entry_of
from adapters_store.declared_base import difference, is_known, remarks
from adapters_store.errors import UnsupportedAdapter
from adapters_store.parts import LowRank, describe
from adapters_store.ref import AdapterRef
from adapters_store.verifier import VerifierBusy, VerifierClosed
from server.api.bodies import read_body
from server.api.errors import respond
from server.api.protocol import AdapterBody
from server.api.service import Service, service_of
from server.api.sse import unless_client_leaves
from server.engine.messages import AdapterOnDevice
from server.errors import Overloaded, ShuttingDown

log = logging.getLogger("heddle.adapters")
router = APIRouter()


@router.post("/v1/adapters")
async def add(request: Request) -> Response:
    """Verify the adapter and give it a name: 201, or 200 if the name already meant these very weights.

    Its weights travel to the device when a request first asks for it.
    """
    service, body = service_of(request), await read_body(request, AdapterBody)
    entry = await unless_client_leaves(request, verified(body.name, body.path, service, body.ignore_keys))
    is_new = register(entry, service)
    declared = entry.package.declared_base or "a base that it does not name"
    log.info("adapter %s: %s, trained on %s", entry.ref.name, entry.ref.kind, declared)
    told = _adapter(entry, service, _on_device(service)) | {"notes": list(entry.package.notes)}
    return respond(201 if is_new else 200, told)


@router.get("/v1/adapters")
async def list_all(request: Request) -> Response:
    service = service_of(request)
    on_device = _on_device(service)
    data = [_adapter(entry, service, on_device) for entry in service.catalog]
    return respond(200, {"object": "list", "data": data})


@router.get("/v1/adapters/{name}")
async def get_one(name: str, request: Request) -> Response:
    service = service_of(request)
    entry = service.catalog.get(name)
    return respond(200, _adapter(entry, service, _on_device(service)) | describe(entry.package))


@router.delete("/v1/adapters/{name}")
async def delete(name: str, request: Request) -> Response:
    """New requests no longer find it; those under way finish on its weights, which leave the device after them."""
    service = service_of(request)
    entry = service.catalog.remove(name)
    service.client.remove_adapter(entry.ref)
    service.metrics.forget_model(name)
    return respond(200, {"id": name, "object": "adapter", "deleted": True})


async def verified(name: str, path: str, service: Service, ignore_keys: Sequence[str] = ()) -> CatalogEntry:
    """The adapter at `path`, fit to be registered under this name. Raises AdapterError, Overloaded, ShuttingDown."""
    try:
        entry = entry_of(name, await service.verifier.verify(service.catalog.job(name, path, ignore_keys)))
    except VerifierBusy:
        raise Overloaded("as many adapters wait to be verified as may; try again later") from None
    except VerifierClosed:
        raise ShuttingDown from None
    _check_base(entry, service)
    return entry


def register(entry: CatalogEntry, service: Service) -> bool:
    """Whether the name did not yet mean these weights."""
    is_new = service.catalog.add(entry)
    service.client.add_adapter(entry.ref, entry.package)  # known or not: its files may be elsewhere now
    for note in entry.package.notes if is_new else ():
        log.info("adapter %s: %s", entry.ref.name, note)
    for warning in warnings_for(entry, service):
        log.warning("adapter %s: %s", entry.ref.name, warning)
    return is_new


def warnings_for(entry: CatalogEntry, service: Service) -> list[str]:
    """What is served and may still not be what was meant, in sentences."""
    told = remarks(entry.package.declared_base, service.catalog.base_names)
    above = _rank_above_graphs(entry, service)
    return [*told, above] if above else told


def _check_base(entry: CatalogEntry, service: Service) -> None:
    declared, known = entry.package.declared_base, service.catalog.base_names
    if service.config.strict_base and declared is not None and not is_known(declared, known):
        raise UnsupportedAdapter(
            f"{difference(declared, known)} The server was started with --strict-base; if both are the same model, "
            "start it with --base-name and the adapter's name for it"
        )


def _rank_above_graphs(entry: CatalogEntry, service: Service) -> str | None:
    """What a LoRA of a higher rank than decodes were captured for costs, if this is one."""
    limit = service.info.graph_rank
    rank = max((part.rank for part in entry.package.parts if isinstance(part, LowRank)), default=0)
    if limit is None or rank <= limit:
        return None
    return (
        f"The adapter's rank {rank} is above {limit}, the highest that decodes are captured for: every step with one "
        "of its requests launches its kernels one by one, and the requests beside it wait too; "
        f"--max-rank {rank} captures it."
    )


def _on_device(service: Service) -> dict[AdapterRef, AdapterOnDevice]:
    return {it.ref: it for it in service.client.stats.adapters}


def _adapter(
    entry: CatalogEntry, service: Service, residents: Mapping[AdapterRef, AdapterOnDevice]
) -> dict[str, object]:
    on_device = residents.get(entry.ref)
    return {
        "id": entry.ref.name,
        "object": "adapter",
        "kind": entry.ref.kind,
        "revision": entry.ref.revision,
        "root": entry.root,
        "parent": service.catalog.base_name,
        "declared_base": entry.package.declared_base,
        "warnings": warnings_for(entry, service),
        "created": entry.created,
        "bytes": entry.package.file_bytes,
        "device": {
            "state": on_device.state if on_device else "absent",
            "bytes": on_device.bytes if on_device else 0,
            "running_requests": on_device.pins if on_device else 0,
        },
    }
