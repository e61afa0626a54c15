"""`heddle store`: back it up while its server runs, and read its log."""

import argparse
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime
from pathlib import Path

import msgspec

from adapters_store.errors import clean
from adapters_store.store.backup import back_up, open_to_read
from server.commands.over_http import OverHTTP
from server.commands.reach import add_place, store_of
from server.commands.tables import megabytes, print_json, print_json_array
from server.commands.work import Told


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    group = commands.add_parser(
        "store",
        help="back up the store, read its log",
        description="The store, beside the server that has it open or without one.",
    ).add_subparsers(dest="action", required=True, metavar="ACTION")

    backup = group.add_parser("backup", help="copy the store while its server runs", description="Copy the store as of "
                              "one moment; `heddle serve --store` takes the copy.")  # fmt: skip
    backup.set_defaults(run=_back_up)
    backup.add_argument("directory", metavar="DIR", type=Path, help="a new directory, or an empty one")
    backup.add_argument("--json", action="store_true", help="one JSON object")
    add_place(backup, with_url=False)

    log = group.add_parser("log", help="who changed what", description="Who changed what, the oldest first.")
    log.set_defaults(run=_log)
    log.add_argument("--json", action="store_true", help="a JSON array")
    add_place(log)


def _back_up(options: argparse.Namespace) -> int:
    done = back_up(store_of(options)[0], options.directory)
    if options.json:
        print_json(done._asdict())
    else:
        print(
            f"{done.num_names} adapters with {megabytes(done.num_bytes)} in {done.num_blobs} files, of which "
            f"{done.num_linked} are links to those of the store"
        )
    return 0


def _log(options: argparse.Namespace) -> int:
    lines = OverHTTP(options.url).log() if options.url is not None else _kept(store_of(options)[0])
    if options.json:
        print_json_array(lines)
        return 0
    for line in lines:
        at = datetime.fromtimestamp(line["at"]).astimezone().isoformat(" ", "seconds")
        told = (line["actor"], line["action"], line["name"], (line["revision"] or "")[:12], line["details"] or "")
        print("  ".join((at, *(clean(part) for part in told if part))))
    return 0


def _kept(store: Path) -> Iterator[Told]:
    with closing(open_to_read(store)) as journal:
        after = 0
        while lines := journal.log(after, 1000):
            yield from map(msgspec.to_builtins, lines)
            after = lines[-1].id
