"""What people are told of an adapter: the same by a server and by a command that reads its store."""

import time
from typing import Any

from adapters_store.catalog import Found
from adapters_store.records import Alias


def told_of(found: Found, base_name: str) -> dict[str, Any]:
    record, version, weights = found
    return {
        "id": record.name,
        "object": "adapter",
        "kind": weights.kind,
        "revision": weights.revision,
        "root": version.root,
        "parent": base_name,
        "declared_base": version.declared_base,
        "created": record.created,
        "since": version.since,
        "bytes": weights.num_bytes,
        "durable": record.is_durable,
        "state": _state(found),
        "fault": weights.fault,
        "parity": weights.parity,
        "manifest": version.manifest,
        "notes": version.notes,
        "versions": [{"revision": it.revision, "since": it.since} for it in record.versions],
    }


def _state(found: Found) -> str:
    if found.version.manifest.has_expired(time.time()):  # kept only because an alias stands for it
        return "expired"
    return "ready" if found.weights.fault is None else "quarantined"


def told_of_alias(alias: Alias) -> dict[str, Any]:
    return {"id": alias.name, "object": "alias", "created": alias.created, "targets": alias.targets}
