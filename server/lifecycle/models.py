"""What a request's `model` means: the base, an adapter, one of its revisions, or an alias that stands for several."""

import hashlib
import math
import random
import time
from collections.abc import Sequence
from typing import NamedTuple

from adapters_store.catalog import Catalog
from adapters_store.errors import AdapterNotFound, AdapterQuarantined
from adapters_store.manifest import PLAIN, Manifest
from adapters_store.records import Alias, Target
from adapters_store.ref import AdapterRef
from server.errors import NotFound


class Meant(NamedTuple):
    """`model` is what was found, as an answer names it: for an alias the target that was chosen. `label` is the name
    without a revision. `ref` None: the base."""

    model: str
    label: str
    ref: AdapterRef | None
    manifest: Manifest


def meaning_of(model: str, catalog: Catalog, user: str | None = None) -> Meant:
    """Raises NotFound and AdapterQuarantined."""
    if model == catalog.base_name:
        return Meant(model, model, None, PLAIN)
    alias = catalog.alias(model)
    if alias is not None:
        return _chosen(alias, catalog, user)
    try:
        found = catalog.find(model)
    except AdapterNotFound:
        raise _not_found(model) from None
    manifest = found.version.manifest
    if manifest.has_expired(time.time()):
        raise _not_found(model)
    if found.weights.fault is not None:
        raise AdapterQuarantined(f"the adapter {model!r} is in quarantine: {found.weights.fault}")
    return Meant(model, found.record.name, found.ref, manifest)


def _chosen(alias: Alias, catalog: Catalog, user: str | None) -> Meant:
    """A target that is served, by weight: the same for the same user as long as the targets stay as they are. A target
    that is missing or in quarantine leaves its share to the others."""
    left = [target for target in alias.targets if target.weight > 0]
    problem: Exception = _not_found(alias.name)
    while left:
        target = choose(alias.name, left, user)
        try:
            return meaning_of(target.model, catalog)
        except (NotFound, AdapterQuarantined) as error:
            problem = error
            left.remove(target)
    raise problem


def choose(name: str, targets: Sequence[Target], user: str | None) -> Target:
    """By weighted rendezvous hashing: each target draws a number from the user's name and its own, and the best wins.
    So when weights change, only those users move whom the change concerns. Without a user the draw is random."""

    def score(target: Target) -> float:
        if user is None:
            drawn = random.random()
        else:
            words = "\0".join((name, user, target.model)).encode(errors="surrogatepass")
            drawn = int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little") / 2**64
        return -target.weight / math.log((drawn * 2**53 + 0.5) / (2**53 + 1))

    return max(targets, key=score)


def _not_found(model: str) -> NotFound:
    return NotFound(f"the model {model[:128]!r} does not exist", param="model", code="model_not_found")
