"""Bodies of the routes for adapters and aliases."""

from typing import Annotated, Any

from pydantic import ConfigDict, Field, WithJsonSchema
from pydantic.config import JsonDict

from adapters_store.catalog import MOST_WEIGHT
from adapters_store.manifest import Manifest
from server.api.protocol.body import Body, Finite
from server.api.protocol.schema import ADAPTER_NAME, SOMETHING, given, schema_of

_PLACES = ("path", "upload", "source")
_RULES: JsonDict = {
    "oneOf": [
        given(**{place: SOMETHING if place == it else {"type": "null"} for place in _PLACES}) | {"required": [it]}
        for it in _PLACES
    ]
}
Name = Annotated[str, WithJsonSchema(ADAPTER_NAME)]


class AdapterBody(Body):
    """`path` is a directory on the server, below one of its adapter roots; relative ones are taken below the first.
    `upload` is the id of one that is complete, `source` a place that the operator allows; it is one of the three.
    `ignore_keys` are unknown keys of the adapter's configuration that may be passed over. `manifest` stands for the one
    that lies there. `verify`: compare with merged weights before the name means anything."""

    model_config = ConfigDict(json_schema_extra=_RULES)

    name: Name | None = None
    path: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    upload: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    source: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    manifest: Annotated[dict[str, Any], WithJsonSchema(schema_of(Manifest))] | None = None
    verify: bool = False
    ignore_keys: Annotated[list[Annotated[str, Field(max_length=200)]], Field(max_length=64, fail_fast=True)] = []


class RollbackBody(Body):
    """`revision`: the first digits of the one to go back to; none: the one before."""

    revision: Annotated[str, Field(min_length=1, max_length=64)] | None = None


class AliasTarget(Body):
    model: Annotated[str, Field(max_length=256)]
    weight: Annotated[Finite, Field(ge=0, json_schema_extra={"exclusiveMaximum": MOST_WEIGHT})] = 1.0


class AliasBody(Body):
    alias: Name | None = None
    targets: Annotated[list[AliasTarget], Field(min_length=1, max_length=32, fail_fast=True)]
