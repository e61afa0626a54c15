"""Adapters of a store that no server has open. The command holds the store's lock, and changes are planned, written and
applied as a server does it, by the same code; only that there is no engine."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import msgspec

from adapters_store.base_id import base_id
from adapters_store.catalog import Catalog, Found
from adapters_store.errors import AdapterError, BaseUnreadable, GivenUp, InvalidManifest, StoreFailed
from adapters_store.manifest import parse_manifest
from adapters_store.records import Weights
from adapters_store.ref import AdapterRef
from adapters_store.store.store import Store
from adapters_store.told import told_of, told_of_alias
from server import storage
from server.commands.work import Told, Wanted
from server.exits import EXIT_FAILED, EXIT_REFUSED, Failed
from server.lifecycle.registry import Registry

if TYPE_CHECKING:
    from server.lifecycle.lifecycle import Lifecycle

log = logging.getLogger("heddle.adapters")


class Offline:
    """`model_dir`: the base's directory, where that is known: some manifests cannot be checked without it."""

    def __init__(self, store: Store, model_dir: Path | None, verify_timeout_s: float, actor: str) -> None:
        self.where = f"offline, in the store {str(store.directory)!r}"
        self._identity = storage.remembered(store)
        self._catalog = Catalog(self._identity.base_name)
        self._registry = Registry(self._catalog, store, is_durable=True)
        self._registry.load()
        self._model_dir, self._timeout_s, self._actor = model_dir, verify_timeout_s, actor
        self._runner = asyncio.Runner()

    def adapters(self) -> list[Told]:
        return [self._told(self._catalog.find(record.name)) for record in self._catalog]

    def aliases(self) -> list[Told]:
        return [_plain(told_of_alias(alias)) for alias in self._catalog.aliases]

    def add(self, wanted: Wanted) -> Told:
        return self._runner.run(self._add(wanted))

    def remove(self, name: str, drain_s: float | None) -> Told:
        return self._runner.run(self._remove(name, drain_s))

    def collect(self) -> Told:
        return self._runner.run(self._collect())

    def verify(self, model: str) -> Told:
        return self._runner.run(self._verify(model))

    def close(self) -> None:
        with self._runner:
            self._runner.run(self._registry.close())

    # -- changes -----------------------------------------------------------

    async def _add(self, wanted: Wanted) -> Told:
        from server.lifecycle.wish import Wish

        if wanted.verify:
            raise Failed(
                "--verify compares with merged weights, which takes a running server: start one, or leave it out",
                EXIT_REFUSED,
            )
        manifest = None if wanted.manifest is None else parse_manifest(wanted.manifest, "the manifest")
        async with self._lifecycle() as lifecycle:
            path, roots = os.path.realpath(wanted.path), _roots(wanted.path)
            wish = Wish(
                wanted.name,
                lambda desk: lifecycle.inspection.rules.job_below(roots, path, wanted.ignore_keys, desk),
                manifest,
                root=path,
            )
            change = lifecycle.replace if wanted.replace else lifecycle.register
            settled = await change(wish, self._actor)
            notes = {"notes": list(settled.notes), "warnings": lifecycle.inspection.warnings_for(settled.found)}
        return self._told(settled.found) | notes

    async def _remove(self, name: str, drain_s: float | None) -> Told:
        async with self._lifecycle() as lifecycle:
            freed = await lifecycle.delete(name, self._actor, drain_s)
        told = {"device_bytes": freed.device_bytes, "disk_bytes": freed.disk_bytes}
        return {"id": name, "object": "adapter", "deleted": True, "freed": told}

    async def _collect(self) -> Told:
        async with self._lifecycle() as lifecycle:
            num_gone, freed = await lifecycle.collect(self._actor)
        return {"object": "gc", "revisions": num_gone, "disk_bytes": freed}

    async def _verify(self, model: str) -> Told:
        """Read what is kept, and read the adapter from that. What a comparison with merged weights found stays: it is a
        server's to make again."""
        found = self._catalog.find(model)
        fault = await self._fault(found)
        weights = _judged(found.weights, fault)
        if weights != found.weights:
            await self._registry.change(lambda: self._catalog.marked(found.record.name, weights), self._actor)
        told = self._told(self._catalog.find(model))
        return told if fault is None else told | {"state": "quarantined", "fault": fault}

    async def _fault(self, found: Found) -> str | None:
        try:
            damaged = await self._registry.fault(found.ref.revision)
            content = await self._registry.content(found.ref.revision)
        except StoreFailed as error:
            return str(error)
        if damaged is not None:
            return damaged
        try:
            async with self._lifecycle() as lifecycle:
                read = await lifecycle.inspection.read_stored(found, content)
        except GivenUp as error:  # which says nothing of the files
            raise Failed(str(error), EXIT_FAILED) from None
        except AdapterError as error:
            return str(error)
        if read.weights.revision == found.ref.revision:
            return None
        return f"what the store has of it is the revision {read.weights.revision[:12]}"

    # -- what a server has and a command makes do without -----------------------------------------------------------

    @asynccontextmanager
    async def _lifecycle(self) -> "AsyncIterator[Lifecycle]":
        # a tenth of a second of imports, which listing does without
        from adapters_store.rules import Rules
        from adapters_store.verifier import Verifier
        from server.lifecycle.inspection import Inspection
        from server.lifecycle.leases import Leases
        from server.lifecycle.lifecycle import Lifecycle

        verifier = Verifier(self._timeout_s)
        inspection = Inspection(
            self._registry,
            Rules(self._identity.base, room=self._identity.room),
            verifier,
            _NoEngine(),
            self._identity.terms,
            base_id=partial(self._registry.base_id, self._read_base_id),
            check_template=self._check_template,
        )
        lifecycle = Lifecycle(inspection, _NoEngine(), Leases(), on_delete=lambda name: None)
        level = log.level
        log.setLevel(logging.ERROR)  # what a server logs beside that, a command tells
        try:
            yield lifecycle
        finally:
            log.setLevel(level)
            await lifecycle.stop()
            await verifier.close()

    def _read_base_id(self) -> str:
        if self._model_dir is None:
            raise BaseUnreadable(
                "the store does not know its base's identity yet: name the base's directory with --model"
            )
        return base_id(self._model_dir)

    def _check_template(self, template: str) -> None:
        if self._model_dir is None:
            raise InvalidManifest("its chat template is tried on the base's tokenizer: name its directory with --model")
        from server.api.texts.text import Text

        Text.load(self._model_dir).with_template(template)

    def _told(self, found: Found) -> Told:
        return _plain(told_of(found, self._catalog.base_name))


class _NoEngine:
    """Nothing is on a device, so nothing has to leave it."""

    def add_adapter(self, ref: AdapterRef) -> None:
        pass

    async def remove_adapter(self, ref: AdapterRef) -> int:
        return 0

    def is_given_up(self, ref: AdapterRef) -> bool:
        return False

    async def check_adapter(self, ref: AdapterRef, num_tokens: int) -> NoReturn:
        raise AssertionError("there is no engine to compare with")


def _judged(weights: Weights, fault: str | None) -> Weights:
    if fault is not None and (weights.fault is None or weights.is_lost):
        return msgspec.structs.replace(weights, fault=f"{fault}: register it again", is_lost=True)
    if fault is None and weights.is_lost:
        return msgspec.structs.replace(weights, fault=None, is_lost=False)
    return weights


def _roots(path: Path) -> tuple[str, ...]:
    """Its own directory: whoever gives the command may read it. In a hub's cache its files are links to blobs that lie
    two directories above, within the cache of that repository."""
    own = Path(os.path.realpath(path))
    return (str(own), str(own.parent.parent)) if own.parent.name == "snapshots" else (str(own),)


def _plain(told: Told) -> Told:
    plain: Told = msgspec.to_builtins(told)
    return plain
