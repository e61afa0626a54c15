"""What the catalogue holds: weights, the names that mean them, and aliases. Small, since all of it is in memory."""

import msgspec

from adapters_store.manifest import PLAIN, Manifest
from adapters_store.parts import AdapterPackage, LowRank, SourceFile
from adapters_store.ref import AdapterRef, Kind


class Parity(msgspec.Struct, frozen=True):
    """What `verify: true` found: the largest difference between a logit of the served adapter and the same of the base
    with its weights merged, over `num_tokens` tokens whose largest logit was `max_logit`; and what was allowed."""

    max_difference: float
    bound: float
    max_logit: float
    num_tokens: int
    checked: int  # Unix seconds


class Weights(msgspec.Struct, frozen=True):
    """One revision, whatever it is called. `fault` says why it is in quarantine; None: it is served. `is_lost`: its
    files are not there as they were stored, or the engine has given it up, which registering it again mends. `ignored`
    are keys of its configuration that were passed over as asked."""

    revision: str
    kind: Kind
    num_bytes: int  # of its files
    max_rank: int = 0
    fault: str | None = None
    parity: Parity | None = None
    is_lost: bool = False
    ignored: tuple[str, ...] = ()

    @property
    def differs(self) -> bool:
        """A comparison with merged weights found it wanting, and only another one makes that void."""
        return (
            self.fault is not None and self.parity is not None and not self.parity.max_difference <= self.parity.bound
        )


class Version(msgspec.Struct, frozen=True):
    """What a name meant from `since` (Unix seconds) on. `root`: where its files came from, for people. `declared_base`
    and `notes` are what was read in them beside the weights (see AdapterPackage): equal weights may say different
    things of themselves."""

    revision: str
    root: str
    since: int
    manifest: Manifest = PLAIN
    declared_base: str | None = None
    notes: tuple[str, ...] = ()


class Record(msgspec.Struct, frozen=True):
    """A name and what it means, newest first: the first is current, the others were replaced and still resolve.

    `is_durable`: it outlives the server. `created` in Unix seconds.
    """

    name: str
    versions: tuple[Version, ...]
    created: int
    is_durable: bool = True

    @property
    def current(self) -> Version:
        return self.versions[0]


class Target(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`model`: an adapter, one of its revisions as name@revision, or the base."""

    model: str
    weight: float = 1.0


class Alias(msgspec.Struct, frozen=True):
    name: str
    targets: tuple[Target, ...]
    created: int


class Content(msgspec.Struct, frozen=True):
    """What is kept of a revision on disk beside its summary. `package` is an encoded AdapterPackage (MessagePack) and
    `description` what people are told of it (JSON): whoever stores and hands on either need not understand it. `files`
    are all that were kept, with paths relative to the blobs."""

    package: bytes
    description: bytes
    files: tuple[SourceFile, ...]


class LogLine(msgspec.Struct, frozen=True):
    """One change: who did what to which name, and which weights it means since. `at` in Unix seconds."""

    id: int
    at: float
    actor: str
    action: str
    name: str
    revision: str | None
    details: str | None


def weights_of(package: AdapterPackage) -> Weights:
    max_rank = max((part.rank for part in package.parts if isinstance(part, LowRank)), default=0)
    return Weights(package.revision, package.kind, package.file_bytes, max_rank)


def ref_to(name: str, weights: Weights) -> AdapterRef:
    return AdapterRef(name, weights.revision, weights.kind)
