"""Where a command finds the adapters: on a running server, or in a store that no server has open."""

import argparse
import os
import pwd
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from adapters_store.base_id import fingerprint
from adapters_store.errors import StoreLocked, clean
from adapters_store.store.store import Store, check_is_store, open_store
from server import storage
from server.commands.offline import Offline
from server.commands.over_http import OverHTTP
from server.commands.serve import demo_base
from server.commands.work import Reached
from server.exits import EXIT_FAILED, Failed

_WAIT_S = 5.0  # for another command to end, or for a server that starts to say where it listens


def add_place(command: argparse.ArgumentParser, with_url: bool = True) -> None:
    place = command.add_argument_group("where", "The demo's store, unless one of these says which.")
    place.add_argument("--store", metavar="DIR", type=Path, help="a store's directory")
    place.add_argument("--model", metavar="MODEL_DIR", type=Path,
                       help="a base model, whose default store is meant if there is no --store")  # fmt: skip
    if with_url:
        place.add_argument("--url", metavar="URL", type=_url, help="a running server, such as http://127.0.0.1:8000")


def store_of(options: argparse.Namespace) -> tuple[Path, Path | None]:
    """The store's directory, and the base's if that is known. Raises ConfigError and BaseUnreadable."""
    if options.store is not None:
        return options.store, options.model
    model = options.model if options.model is not None else demo_base()
    return storage.default_store(model), model


@contextmanager
def reached(options: argparse.Namespace) -> Iterator[Reached]:
    """Says on standard error which it is."""
    with closing(_reach(options)) as found:
        print(f"heddle: {clean(found.where)}", file=sys.stderr)
        yield found


def _reach(options: argparse.Namespace) -> Reached:
    if options.url is not None:
        return OverHTTP(options.url)
    directory, model = store_of(options)
    store = _opened(directory)
    if isinstance(store, str):
        return OverHTTP(store, is_own=True)
    try:
        if model is not None:
            storage.check_base(store, fingerprint(model))
        storage.forget_where(store)  # of a server that was killed
        return Offline(store, model, getattr(options, "verify_timeout_s", 60.0), actor())
    except BaseException:
        store.close()
        raise


def _opened(directory: Path) -> Store | str:
    """The store, or the URL of the server that has it open."""
    check_is_store(directory)
    deadline = time.monotonic() + _WAIT_S
    while True:
        try:
            return open_store(directory)
        except StoreLocked:
            url = storage.where(directory)
            if url is not None:
                return url
            if time.monotonic() > deadline:
                raise Failed(
                    "the store is in use by another command, or by a server that does not listen yet; try again when "
                    "that is done", EXIT_FAILED
                ) from None  # fmt: skip
        time.sleep(0.05)


def actor() -> str:
    """Who gives the command, for the log: whom the system says, since environments say anything."""
    try:
        return f"cli:{pwd.getpwuid(os.getuid()).pw_name}"
    except KeyError:
        return f"cli:{os.getuid()}"


def _url(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError("a URL begins with http:// or https://")
    return text
