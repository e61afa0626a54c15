"""The catalogue: which adapters exist, by name. Residency on a device is another matter (server/weights).

It is bookkeeping in memory. A change is first planned, which checks it, then written down (store/journal.py), and then
applied: so what is in memory was on disk before, and a change that could not be written has not happened.
"""

import re
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from adapters_store.errors import (
    AdapterConflict,
    AdapterNotFound,
    CatalogFull,
    InvalidAdapterName,
    InvalidAlias,
    shown,
)
from adapters_store.records import Alias, Record, Target, Version, Weights, ref_to
from adapters_store.ref import AdapterRef

# usable as a URL segment, in a metric label and in a comma-joined list; `@` stands between name and revision
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_PREFIX = re.compile(r"[0-9a-f]{4,64}")
KEPT_VERSIONS = 5  # replaced ones of a name that `trimmed` leaves
MAX_TARGETS, MOST_WEIGHT = 32, 1e9  # of an alias


class Change(msgspec.Struct, frozen=True):
    """One thing that happens to one name. `record` or `alias` is what the name means after it; neither: nothing any
    more, unless only its `weights` have changed.

    `weights` are new, or are known and have changed.
    """

    action: str
    name: str
    record: Record | None = None
    alias: Alias | None = None
    weights: Weights | None = None
    details: str | None = None

    @property
    def revision(self) -> str | None:
        if self.record is not None:
            return self.record.current.revision
        return self.weights.revision if self.weights is not None else None


class Found(NamedTuple):
    """What a model's name means now."""

    record: Record
    version: Version
    weights: Weights

    @property
    def ref(self) -> AdapterRef:
        return ref_to(self.record.name, self.weights)


class Catalog:
    """Adapters and aliases by name. A name is unique among both without regard to case, and never the base's own."""

    def __init__(self, base_name: str, max_adapters: int = 100_000) -> None:
        self.base_name = base_name
        self._max_adapters = max_adapters
        self._records: dict[str, Record] = {}
        self._aliases: dict[str, Alias] = {}
        self._order: list[str] = []  # keys of the records, sorted
        self._weights: dict[str, Weights] = {}
        self._names: dict[str, set[str]] = {}  # revision -> keys of the records that mean it, now or before
        self._pinned: set[str] = set()  # keys of records
        self._expiring: list[tuple[int, str]] = []  # when, and keys of records, sorted: it is looked at each second
        self._aliased: Counter[str] = Counter()  # adapter -> targets of all aliases that name it

    # -- what is there -----------------------------------------------------------

    def get(self, name: str) -> Record:
        """Raises AdapterNotFound."""
        record = self._records.get(name.casefold())
        if record is None or record.name != name:
            raise AdapterNotFound(name)
        return record

    def find(self, model: str) -> Found:
        """By `name`, or by `name@revision`, where the first digits of a revision do if no other of the name's has the
        same. Raises AdapterNotFound."""
        name, at, prefix = model.partition("@")
        record = self.get(name)
        if not at:
            version = record.current
        else:
            meant = self._versions(record, prefix)
            if len({version.revision for version in meant}) != 1:
                raise AdapterNotFound(model)
            version = meant[0]
        return Found(record, version, self._weights[version.revision])

    def found_after(self, name: str, change: Change | None) -> Found:
        """What the name will mean once this change, which was planned just now, is applied; None: none is needed."""
        record, weights = (change.record, change.weights) if change is not None else (None, None)
        record = record or self.get(name)
        return Found(record, record.current, weights or self._weights[record.current.revision])

    def weights(self, revision: str) -> Weights | None:
        return self._weights.get(revision)

    def alias(self, name: str) -> Alias | None:
        alias = self._aliases.get(name.casefold())
        return alias if alias is not None and alias.name == name else None

    def is_used(self, revision: str) -> bool:
        """Whether a name means these weights, or meant them and still resolves."""
        return revision in self._names

    def holding(self, revision: str) -> list[Record]:
        """The names that mean these weights, or meant them and still resolve."""
        return [self._records[key] for key in self._names.get(revision, ())]

    def meaning(self, revision: str) -> list[Record]:
        """The names that mean these weights now."""
        return [record for record in self.holding(revision) if record.current.revision == revision]

    def page(self, after: str | None, limit: int) -> list[Record]:
        """Records in order of name, from behind `after`."""
        start = 0 if after is None else bisect_right(self._order, after.casefold())
        return [self._records[key] for key in self._order[start : start + limit]]

    @property
    def pinned(self) -> list[Record]:
        return [self._records[key] for key in self._pinned]

    def expired(self, now: float) -> list[str]:
        """Names whose time has come; `now` in Unix seconds."""
        return [self._records[key].name for _, key in self._expiring[: bisect_right(self._expiring, now, key=_when)]]

    @property
    def aliases(self) -> list[Alias]:
        return sorted(self._aliases.values(), key=lambda alias: alias.name)

    def __iter__(self) -> Iterator[Record]:
        return (self._records[key] for key in tuple(self._order))

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, name: str) -> bool:
        record = self._records.get(name.casefold())
        return record is not None and record.name == name

    # -- changes, planned: nothing is different yet -----------------------------------------------------------

    def check_name(self, name: str) -> None:
        """Raises AdapterError for what no adapter and no alias may be called."""
        if not _NAME.fullmatch(name):
            raise InvalidAdapterName(
                f"{shown(name)!r} is not an adapter name: 1 to 128 of A-Z a-z 0-9 . _ - with a letter or digit first"
            )
        if name.casefold() == self.base_name.casefold():
            raise AdapterConflict(f"{name!r} is the name of the base model; take another")

    def registered(self, name: str, weights: Weights, version: Version, is_durable: bool) -> Change | None:
        """The name comes to mean these weights. None if it does already. Raises AdapterConflict if it means others."""
        self._check_free(name, self._aliases)
        weights, known = self._judged(weights), self._records.get(name.casefold())
        if known is None:
            return self._created(name, weights, version, is_durable)
        if known.name != name:
            raise AdapterConflict(f"the name {name!r} is taken by {known.name!r}; delete that adapter first")
        if known.current.revision != version.revision:
            raise AdapterConflict(
                f"the name {name!r} is taken by other weights; replace them with PUT, or delete that adapter first"
            )
        if version.manifest != known.current.manifest:
            raise AdapterConflict(f"{name!r} has these weights and another manifest; replace it with PUT")
        if known.is_durable or not is_durable:
            return self._mended(name, weights)
        return Change("register", name, record=msgspec.structs.replace(known, is_durable=True), weights=weights)

    def replaced(self, name: str, weights: Weights, version: Version) -> Change | None:
        """The name means these weights from now on, and what it meant still resolves. None if nothing changes."""
        self._check_free(name, self._aliases)
        weights, known = self._judged(weights), self._records.get(name.casefold())
        if known is None:
            return self._created(name, weights, version, is_durable=True)
        known = self.get(name)
        before = known.current
        if before.revision == version.revision:
            if known.is_durable and before == msgspec.structs.replace(version, since=before.since, root=before.root):
                return self._mended(name, weights)
            versions = (version, *known.versions[1:])
        else:
            versions = (version, *(it for it in known.versions if it.revision != version.revision))
        record = msgspec.structs.replace(known, versions=versions, is_durable=True)
        return Change("replace", name, record=record, weights=weights, details=before.revision)

    def rolled_back(self, name: str, prefix: str | None, now: int) -> Change:
        """The name means again what it meant before, or the revision that begins so; what it means now still does."""
        known = self.get(name)
        if prefix is None:
            meant = list(known.versions[1:2])
        else:
            meant = [it for it in self._versions(known, prefix) if it is not known.current]
        if len(meant) != 1:
            raise AdapterConflict(
                f"{name!r} has no other revision to go back to"
                if prefix is None
                else f"{len(meant)} replaced revisions of {name!r} begin with {shown(prefix)!r}; give enough of one"
            )
        if meant[0].manifest.has_expired(now):
            raise AdapterConflict(
                f"{meant[0].revision[:12]} of {name!r} expired at {meant[0].manifest.expires_at} (Unix seconds), so it "
                "would be deleted at once; register it with another expires_at (PUT)"
            )
        version = msgspec.structs.replace(meant[0], since=now)
        versions = (version, *(it for it in known.versions if it.revision != version.revision))
        record = msgspec.structs.replace(known, versions=versions, is_durable=True)
        return Change("rollback", name, record=record, details=known.current.revision)

    def removed(self, name: str) -> Change:
        if name == self.base_name:
            raise AdapterConflict(f"{name!r} is the base model and cannot be deleted")
        record = self.get(name)
        self._check_no_alias(name)
        return Change("delete", name, details=record.current.revision)

    def trimmed(self, record: Record, keep: int = KEPT_VERSIONS) -> Change | None:
        """Of what the name meant before, the last few still resolve, and what an alias names. None if those are all."""
        if len(record.versions) <= 1 + keep:
            return None
        wanted = self._revisions_in_aliases(record) if self._aliased[record.name] else set()
        last = record.versions[: 1 + keep]
        versions = tuple(it for it in record.versions if it in last or it.revision in wanted)
        if len(versions) == len(record.versions):
            return None
        gone = ", ".join(it.revision[:12] for it in record.versions if it not in versions)
        kept = msgspec.structs.replace(record, versions=versions)
        return Change("collect", record.name, record=kept, details=gone)

    def marked(self, name: str, weights: Weights) -> Change:
        """The weights' fault or parity is another one now."""
        return Change("quarantine" if weights.fault else "check", name, weights=weights, details=weights.fault)

    def aliased(self, name: str, targets: tuple[Target, ...], now: int) -> Change:
        self._check_free(name, self._records)
        if not 0 < len(targets) <= MAX_TARGETS:
            raise InvalidAlias(f"{len(targets)} targets; an alias has 1 to {MAX_TARGETS}")
        for target in targets:
            if not 0 <= target.weight < MOST_WEIGHT:
                raise InvalidAlias(f"the weight of {shown(target.model)!r} is {target.weight:g}; 0 to 1e9 is served")
            if self.alias(target.model) is not None:
                raise InvalidAlias(f"{shown(target.model)!r} is an alias itself; name what it stands for")
            if target.model != self.base_name:
                self.find(target.model)
        if len({target.model for target in targets}) < len(targets):
            raise InvalidAlias("a target is named twice; add its weights")
        if not sum(target.weight for target in targets) > 0:
            raise InvalidAlias("all weights are 0, so no request could be served; give one target a weight above 0")
        known = self._aliases.get(name.casefold())
        if known is not None and known.name != name:
            raise AdapterConflict(f"the name {name!r} is taken by the alias {known.name!r}; delete that first")
        alias = Alias(name, targets, known.created if known else now)
        return Change("alias", name, alias=alias, details=_told(alias))

    def unaliased(self, name: str) -> Change:
        if self.alias(name) is None:
            raise AdapterNotFound(name)
        return Change("unalias", name)

    # -- and applied -----------------------------------------------------------

    def apply(self, change: Change) -> list[str]:
        """What was planned on this very state, or read from disk. Returns revisions that nothing means any more."""
        key = change.name.casefold()
        if change.weights is not None and (change.record is not None or change.weights.revision in self._names):
            self._weights[change.weights.revision] = change.weights
        if change.alias is not None or change.action == "unalias":
            self._put_alias(key, change.alias)
        elif change.record is not None:
            return self._put(key, change.record)
        elif change.action == "delete":
            return self._put(key, None)
        return []

    def restore(self, record: Record, weights: Sequence[Weights]) -> None:
        """What was on the disk."""
        self._weights.update({it.revision: it for it in weights})
        self._put(record.name.casefold(), record)

    def _put(self, key: str, record: Record | None) -> list[str]:
        before = self._records.pop(key, None)
        self._pinned.discard(key)
        if before is not None and (at := before.current.manifest.expires_at) is not None:
            del self._expiring[bisect_left(self._expiring, (at, key))]
        if record is not None:
            self._records[key] = record
            if record.current.manifest.pinned:
                self._pinned.add(key)
            if (at := record.current.manifest.expires_at) is not None:
                insort(self._expiring, (at, key))
            for version in record.versions:
                self._names.setdefault(version.revision, set()).add(key)
        if before is None and record is not None:
            insort(self._order, key)
        elif before is not None and record is None:
            del self._order[bisect_right(self._order, key) - 1]
        gone: list[str] = []
        kept = {version.revision for version in record.versions} if record is not None else set()
        for version in before.versions if before is not None else ():
            if version.revision in kept:
                continue
            self._names[version.revision].discard(key)
            if not self._names[version.revision]:
                del self._names[version.revision], self._weights[version.revision]
                gone.append(version.revision)
        return gone

    def _put_alias(self, key: str, alias: Alias | None) -> None:
        before = self._aliases.pop(key, None)
        if alias is not None:
            self._aliases[key] = alias
            self._aliased.update(map(_adapter_of, alias.targets))
        if before is not None:
            self._aliased.subtract(map(_adapter_of, before.targets))
            self._aliased += Counter()  # without those that are 0 now

    def check(self) -> None:
        """Recompute what is kept incrementally."""
        assert self._order == sorted(self._records)
        names: dict[str, set[str]] = {}
        for key, record in self._records.items():
            for version in record.versions:
                names.setdefault(version.revision, set()).add(key)
        assert names == self._names and set(names) == set(self._weights)
        assert not set(self._records) & set(self._aliases)
        manifests = {key: record.current.manifest for key, record in self._records.items()}
        assert self._pinned == {key for key, it in manifests.items() if it.pinned}
        assert self._expiring == sorted(
            (it.expires_at, key) for key, it in manifests.items() if it.expires_at is not None
        )
        for key, record in self._records.items():
            assert key == record.name.casefold() and record.versions
            assert len({it.revision for it in record.versions}) == len(record.versions)
        assert self._aliased == Counter(_adapter_of(it) for alias in self._aliases.values() for it in alias.targets)

    # -- helpers of the plans -----------------------------------------------------------

    def _created(self, name: str, weights: Weights, version: Version, is_durable: bool) -> Change:
        if len(self._records) >= self._max_adapters:
            raise CatalogFull(
                f"{len(self._records):,} adapters are registered, as many as this server takes (--max-adapters); "
                "delete one first"
            )
        record = Record(name, (version,), version.since, is_durable)
        return Change("register", name, record=record, weights=weights)

    def _judged(self, weights: Weights) -> Weights:
        """With what was found of them before: only another comparison, or files that were lost, make that void."""
        known = self._weights.get(weights.revision)
        if known is None or weights.parity is not None or weights.fault is not None:
            return weights
        return msgspec.structs.replace(weights, parity=known.parity) if known.is_lost else known

    def _mended(self, name: str, weights: Weights) -> Change | None:
        return None if self._weights[weights.revision] == weights else self.marked(name, weights)

    def _check_free(self, name: str, others: dict[str, Record] | dict[str, Alias]) -> None:
        self.check_name(name)
        if name.casefold() in others:
            kind = "an alias" if others is self._aliases else "an adapter"
            raise AdapterConflict(f"{name!r} is the name of {kind}; delete that first, or take another name")

    def _check_no_alias(self, name: str) -> None:
        if self._aliased[name]:
            alias = next(it for it in self._aliases.values() if name in map(_adapter_of, it.targets))
            raise AdapterConflict(f"the alias {alias.name!r} stands for {name!r}; change or delete the alias first")

    def _versions(self, record: Record, prefix: str) -> list[Version]:
        if not _PREFIX.fullmatch(prefix):
            return []
        return [version for version in record.versions if version.revision.startswith(prefix)]

    def _revisions_in_aliases(self, record: Record) -> set[str]:
        targets = [it for alias in self._aliases.values() for it in alias.targets if _adapter_of(it) == record.name]
        prefixes = [it.model.partition("@")[2] for it in targets if "@" in it.model]
        return {version.revision for prefix in prefixes for version in self._versions(record, prefix)}


def _when(expiring: tuple[int, str]) -> int:
    return expiring[0]


def _adapter_of(target: Target) -> str:
    return target.model.partition("@")[0]


def _told(alias: Alias) -> str:
    return ", ".join(f"{target.model} {target.weight:g}" for target in alias.targets)
