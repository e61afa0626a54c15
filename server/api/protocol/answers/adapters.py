"""Answers about adapters, aliases, uploads and the store."""

from typing import Annotated, Any, Literal

from pydantic import WithJsonSchema

from adapters_store.manifest import Manifest
from adapters_store.records import LogLine, Parity
from server.api.protocol.answers.answer import Answer
from server.api.protocol.schema import schema_of


class OnDevice(Answer):
    """`host_bytes`: in the host cache. `running_requests`: through these weights, those that wait included."""

    state: Literal["absent", "loading", "host", "resident", "quarantined"]
    bytes: int
    host_bytes: int
    running_requests: int


class Revision(Answer):
    revision: str
    since: int


class AdapterAnswer(Answer):
    id: str
    object: Literal["adapter"]
    kind: str
    revision: str
    root: str
    parent: str
    declared_base: str | None
    created: int
    since: int
    bytes: int
    durable: bool
    state: Literal["ready", "quarantined", "expired"]
    fault: str | None
    parity: Annotated[dict[str, Any], WithJsonSchema(schema_of(Parity))] | None
    manifest: Annotated[dict[str, Any], WithJsonSchema(schema_of(Manifest))]
    notes: list[str]
    versions: list[Revision]
    warnings: list[str]
    device: OnDevice


class Linear(Answer):
    rank: int
    scale: float
    dora: bool = True


class AdapterDescribed(AdapterAnswer):
    """With what is bound: linears by the module's name, experts by layer."""

    bound_tensors: int
    linears: dict[str, Linear] = {}
    experts: dict[str, list[int]] = {}


class AdapterList(Answer):
    object: Literal["list"]
    data: list[AdapterAnswer]
    first_id: str | None
    last_id: str | None
    has_more: bool
    total: int


class Freed(Answer):
    device_bytes: int
    disk_bytes: int


class AdapterDeleted(Answer):
    id: str
    object: Literal["adapter"]
    deleted: Literal[True]
    freed: Freed


class Target(Answer):
    model: str
    weight: float


class AliasAnswer(Answer):
    id: str
    object: Literal["alias"]
    created: int
    targets: list[Target]


class AliasList(Answer):
    object: Literal["list"]
    data: list[AliasAnswer]


class AliasDeleted(Answer):
    id: str
    object: Literal["alias"]
    deleted: Literal[True]


class UploadAnswer(Answer):
    """`files`: bytes by name."""

    id: str
    object: Literal["adapter.upload"]
    files: dict[str, int]
    bytes: int
    max_bytes: int
    max_files: int
    expires_at: int


class UploadDeleted(Answer):
    id: str
    object: Literal["adapter.upload"]
    deleted: Literal[True]


class Collected(Answer):
    object: Literal["gc"]
    revisions: int
    disk_bytes: int


class StoreLog(Answer):
    object: Literal["list"]
    data: list[Annotated[dict[str, Any], WithJsonSchema(schema_of(LogLine))]]
    has_more: bool
