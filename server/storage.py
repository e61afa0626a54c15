"""Which store a server has, and to whom it belongs."""

import json
import logging
import os
from pathlib import Path

import msgspec

from adapters_store.base_id import fingerprint
from adapters_store.base_spec import BaseSpec
from adapters_store.errors import BaseUnreadable, StoreFailed, StoreFull, StoreUnfit
from adapters_store.room import Room
from adapters_store.store.store import Store, open_store
from server.config import ServerConfig
from server.errors import ConfigError
from server.lifecycle.terms import Terms
from server.run_directory import RunDirectory

log = logging.getLogger("heddle.adapters")
ADDRESS = "server.json"


class Identity(msgspec.Struct, frozen=True):
    """The base that a store's adapters were verified against, for commands that run without a server."""

    base_name: str
    base: BaseSpec
    room: Room
    terms: Terms


def default_store(model_dir: Path) -> Path:
    """A directory for this base among the user's data (XDG_DATA_HOME): the same wherever the model lies."""
    data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return Path(data) / "heddle" / f"{model_dir.resolve().name}-{fingerprint(model_dir)[:16]}"


def choose_store(config: ServerConfig, run: RunDirectory) -> tuple[Store, bool]:
    """The store, and whether it outlives the server: one that cannot be written, or that another server has, is
    replaced by an empty one in `run`, with a warning. Raises ConfigError for a store of another base, or a newer
    Heddle's."""
    model_dir = Path(config.engine.model_dir)
    directory = Path(config.store or "")
    try:
        ours = fingerprint(model_dir)
        directory = Path(config.store) if config.store is not None else default_store(model_dir)
        store = open_store(directory)
    except BaseUnreadable as error:  # the engine will say more
        log.warning("%s. So adapters that are registered are forgotten when the server ends", error)
        return open_store(run.path / "store"), False
    except StoreUnfit as error:
        raise ConfigError(f"{str(directory)!r}: {error}") from None
    except (StoreFailed, StoreFull) as error:
        log.warning(
            "%s: %s. Adapters that are registered now are forgotten when the server ends (--store DIR names another "
            "place)", directory, error
        )  # fmt: skip
        return open_store(run.path / "store"), False
    try:
        check_base(store, ours)
    except ConfigError:
        store.close()
        raise
    forget_where(store)  # a server that was killed could not
    store.identify({"fingerprint": ours.encode()})
    return store, True


def check_base(store: Store, ours: str) -> None:
    """Raises ConfigError for a store of another base than the one with this fingerprint."""
    known = store.journal.identity("fingerprint")
    if known is not None and known.decode() != ours:
        raise ConfigError(
            f"the store {str(store.directory)!r} belongs to another base model ({known.decode()[:16]}; this one is "
            f"{ours[:16]}): adapters that were verified against one need not fit another. Name another --store"
        )


def remember(store: Store, identity: Identity) -> None:
    """What a command needs to verify an adapter while no server runs."""
    store.identify({"identity": msgspec.msgpack.encode(identity)})


def remembered(store: Store) -> Identity:
    raw = store.journal.identity("identity")
    if raw is None:
        raise StoreFailed("no server has used this store yet: start one with it first, which knows the base's shapes")
    return msgspec.msgpack.decode(raw, type=Identity)


def say_where(store: Store, url: str) -> None:
    """So that commands find the server that holds the store's lock."""
    (store.directory / ADDRESS).write_text(json.dumps({"url": url, "pid": os.getpid()}))


def where(directory: Path) -> str | None:
    """The URL of the server that has the store, if it listens already."""
    try:
        told = json.loads((directory / ADDRESS).read_text())
    except (OSError, ValueError):
        return None
    url = told.get("url") if isinstance(told, dict) else None
    return url if isinstance(url, str) else None


def forget_where(store: Store) -> None:
    (store.directory / ADDRESS).unlink(missing_ok=True)
