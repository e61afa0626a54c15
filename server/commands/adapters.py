"""`heddle adapters`: list, add, remove, verify, collect; on a running server, or in its store while there is none."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from adapters_store.errors import AdapterNotFound, InvalidManifest, clean
from adapters_store.strict_json import NotStrictJSON, parse_object
from server.commands.reach import add_place, reached
from server.commands.tables import megabytes, print_json, print_table
from server.commands.work import Reached, Told, Wanted
from server.exits import EXIT_REFUSED, Failed

_MAX_MANIFEST_BYTES = 1 << 20
_HEADER = ("name", "kind", "revision", "size", "state", "versions", "description")


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    group = commands.add_parser(
        "adapters",
        help="list, add, remove and verify adapters",
        description="What is registered, on a running server or in its store while no server runs.",
    ).add_subparsers(dest="action", required=True, metavar="ACTION")

    _action(group, "list", "names, what they mean, and aliases", _list)

    add = _action(group, "add", "verify an adapter and give it a name", _add)
    add.add_argument("name", metavar="NAME")
    add.add_argument("path", metavar="PATH", type=Path,
                     help="its directory; a running server must be allowed to read it (--adapter-root)")  # fmt: skip
    add.add_argument("--manifest", metavar="FILE", type=Path,
                     help="a manifest, in place of the one that lies with the adapter")  # fmt: skip
    add.add_argument("--ignore-key", metavar="KEY", action="append", default=[],
                     help="an unknown key of its configuration that may be passed over (repeatable)")  # fmt: skip
    add.add_argument("--replace", action="store_true", help="whatever the name means now")
    add.add_argument("--verify", action="store_true",
                     help="compare with merged weights first, which takes a running server")  # fmt: skip
    _add_timeout(add)

    remove = _action(group, "remove", "delete an adapter", _remove)
    remove.add_argument("name", metavar="NAME")
    remove.add_argument("--drain-s", type=_seconds, metavar="S",
                        help="seconds in which its running requests may finish (as long as they take)")  # fmt: skip

    verify = _action(group, "verify", "read every byte that is kept; a running server also compares logits", _verify)
    verify.add_argument("names", metavar="NAME", nargs="*", help="all, with replaced versions, if there is none")
    _add_timeout(verify)

    _action(group, "gc", "drop all but the last replaced versions, and files that nothing speaks of", _collect)


def _action(
    group: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    text: str,
    work: Callable[[Reached, argparse.Namespace], int],
) -> argparse.ArgumentParser:
    parser = group.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.set_defaults(run=run, work=work)
    parser.add_argument("--json", action="store_true", help="one JSON value in place of a table")
    add_place(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    with reached(options) as adapters:
        status: int = options.work(adapters, options)
        return status


def _list(adapters: Reached, options: argparse.Namespace) -> int:
    found, aliases = adapters.adapters(), adapters.aliases()
    if options.json:
        print_json({"adapters": found, "aliases": aliases})
        return 0
    print_table(_HEADER, map(_row, found))
    if aliases:
        print()
        print_table(("alias", "targets"), ((it["id"], ", ".join(map(_target, it["targets"]))) for it in aliases))
    return 0


def _add(adapters: Reached, options: argparse.Namespace) -> int:
    manifest = None if options.manifest is None else _manifest(options.manifest)
    path = options.path.absolute()
    wanted = Wanted(options.name, path, manifest, tuple(options.ignore_key), options.replace, options.verify)
    told = adapters.add(wanted)
    for remark in (*told.get("notes", ()), *told.get("warnings", ())):
        print(f"heddle: {clean(str(remark))}", file=sys.stderr)
    if options.json:
        print_json(told)
    else:
        print_table(_HEADER, [_row(told)])
    return 0


def _remove(adapters: Reached, options: argparse.Namespace) -> int:
    told = adapters.remove(options.name, options.drain_s)
    if options.json:
        print_json(told)
    else:
        print(f"{clean(options.name)} is deleted, {megabytes(told['freed']['disk_bytes'])} are free on the disk")
    return 0


def _verify(adapters: Reached, options: argparse.Namespace) -> int:
    judged = [_judged(adapters, model) for model in options.names or _every_revision(adapters.adapters())]
    if options.json:
        print_json(judged)
    else:
        rows = ((it["id"], it["revision"][:12], it["state"], it["fault"] or "") for it in judged)
        print_table(("name", "revision", "state", "fault"), rows)
    return 0 if all(it["state"] == "ready" for it in judged) else EXIT_REFUSED


def _judged(adapters: Reached, model: str) -> Told:
    try:
        told = adapters.verify(model)
    except Failed as error:
        if error.status != EXIT_REFUSED:
            raise
        fault = str(error)
    except AdapterNotFound as error:
        fault = str(error)
    else:
        return {field: told[field] for field in ("id", "revision", "state", "fault")}
    return {"id": model, "revision": "", "state": "refused", "fault": fault}


def _every_revision(adapters: list[Told]) -> list[str]:
    """A name for each, the current ones first."""
    names: dict[str, str] = {it["revision"]: it["id"] for it in adapters}
    for it in adapters:
        for version in it["versions"]:
            names.setdefault(version["revision"], f"{it['id']}@{version['revision']}")
    return list(names.values())


def _collect(adapters: Reached, options: argparse.Namespace) -> int:
    told = adapters.collect()
    if options.json:
        print_json(told)
    else:
        print(f"{told['revisions']} revisions are dropped, {megabytes(told['disk_bytes'])} are free on the disk")
    return 0


def _row(told: Told) -> tuple[object, ...]:
    description = told["manifest"].get("description", "") if told["manifest"] else ""
    return (told["id"], told["kind"], told["revision"][:12], megabytes(told["bytes"]), told["state"],
            len(told["versions"]), description)  # fmt: skip


def _target(target: Told) -> str:
    return f"{target['model']} {target['weight']:g}"


def _manifest(file: Path) -> Told:
    try:
        if file.stat().st_size > _MAX_MANIFEST_BYTES:
            raise InvalidManifest(f"the manifest has more than {_MAX_MANIFEST_BYTES:,} bytes")
        return parse_object(file.read_bytes())
    except OSError as error:
        raise InvalidManifest(f"the manifest {file.name!r} cannot be read: {error.strerror}") from None
    except NotStrictJSON as error:
        raise InvalidManifest(f"the manifest {error}") from None


def _add_timeout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--verify-timeout-s", type=_seconds, default=60.0, metavar="S",
                        help="seconds that verifying one adapter may take offline; a server has its own")  # fmt: skip


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 86_400:
        raise argparse.ArgumentTypeError("seconds are a number from 0 to 86400")
    return value
