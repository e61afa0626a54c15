"""What people are told of an adapter: the same by a server and by a command that reads its store."""

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
        "state": "ready" if weights.fault is None else "quarantined",
        "fault": weights.fault,
        "parity": weights.parity,
        "manifest": version.manifest,
        "notes": version.notes,
        "versions": [{"revision": it.revision, "since": it.since} for it in record.versions],
    }


def told_of_alias(alias: Alias) -> dict[str, Any]:
    return {"id": alias.name, "object": "alias", "created": alias.created, "targets": alias.targets}
