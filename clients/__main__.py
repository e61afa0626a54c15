"""Do clients that people have already work, unmodified? ``make clients``, or:

    python -m clients                               # all of them, on the demo; prints the table
    python -m clients --only openai_python litellm  # some
    python -m clients --write                       # and into README.md and benchmarks/results/clients.md

Each client is installed in a room of its own (--rooms), in its newest version the first time and again with --fresh.
One real server serves the demo to all of them, one program after the other. Exit status 1 where something failed.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

from clients import material
from clients.environments import NotInstalled, Program, install, programs_in
from clients.table import Shown, put, read, summary, whole
from tests.support.live_server import ROOT, LiveServer

FOLDER = Path(__file__).resolve().parent
RESULTS = ROOT / "benchmarks" / "results" / "clients.md"
SECONDS = 1200  # for one program


def show(program: Program, rooms: Path, directory: Path, environment: Mapping[str, str], fresh: bool) -> Shown:
    """Whatever goes wrong is in what it returns."""
    results, problem = directory / f"{program.name}.jsonl", None
    results.unlink(missing_ok=True)
    try:
        room, place, path = rooms / program.name, directory / program.name, program.path
        command = install(program, room, fresh)
        place.mkdir(exist_ok=True)
        if program.is_node:  # which looks for packages beside the program
            place, path = room, Path(shutil.copy(path, room))
        starter = FOLDER / ("checks.mjs" if program.is_node else "checks.py")
        arguments = [*command, str(starter), str(path), program.package, str(results)]
        problem = _run(arguments, place, environment, directory / f"{program.name}.log")
    except (NotInstalled, OSError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
    return read(results, program.client, program.path.name, problem)


def _run(arguments: Sequence[str], place: Path, environment: Mapping[str, str], log: Path) -> str | None:
    """In a session of its own, which ends with it: clients start processes too. Returns what went wrong."""
    with log.open("wb") as output:
        process = subprocess.Popen(arguments, cwd=place, env=dict(environment), stdin=subprocess.DEVNULL,
                                   stdout=output, stderr=output, start_new_session=True)  # fmt: skip
        try:
            status = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            return f"not done after {SECONDS} seconds"
        finally:
            _end(process)
    if status:
        return f"ended with status {status}: {log.read_text(errors='replace').strip()[-300:]}"
    return None


def _end(process: "subprocess.Popen[bytes]") -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # nobody is left
    process.wait()


def environment_of(url: str, directory: Path) -> dict[str, str]:
    """Nothing of the caller's that could change what a client does, and a home without anybody's settings."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "TZ") if name in os.environ}
    home = directory / "home"
    home.mkdir(exist_ok=True)
    return {**kept, "HOME": str(home), "TMPDIR": str(directory), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1",
            "HEDDLE_URL": url, "HEDDLE_BASE": str(ROOT / "demo" / "base"),
            "HEDDLE_MATERIAL": str(directory / "material")}  # fmt: skip


def main() -> int:
    programs = programs_in(FOLDER / "programs")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[it.name for it in programs], metavar="PROGRAM")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser.add_argument("--rooms", type=Path, default=cache / "heddle" / "clients", metavar="DIR",
                        help="where clients are installed (%(default)s)")  # fmt: skip
    parser.add_argument("--fresh", action="store_true", help="install again, in the newest versions")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep what clients and server print")
    parser.add_argument("--write", action="store_true", help="the table into README.md and results/clients.md")
    parser.add_argument("--machine", default=f"{len(os.sched_getaffinity(0))} cores", help="in words, for the result")
    options = parser.parse_args()
    if options.write and options.only:
        parser.error("--write needs all programs, or the table would lose the others")
    os.environ["HF_HUB_OFFLINE"] = "1"
    chosen = [it for it in programs if not options.only or it.name in options.only]
    with tempfile.TemporaryDirectory(prefix="heddle-clients-") as made:
        directory = Path(made) if options.logs is None else options.logs.resolve()
        directory.mkdir(parents=True, exist_ok=True)
        material.write(directory / "material")
        shown, complaint = _all(chosen, options.rooms.resolve(), directory, options.fresh)
    table = summary(shown)
    print(table)
    if complaint is not None:
        print(f"\nThe server: {complaint}", file=sys.stderr)
    if options.write:
        put(ROOT / "README.md", table)
        RESULTS.write_text(f"{_head(options.machine)}\n{whole(shown)}", encoding="utf-8")
    return int(complaint is not None or any(it.problems for it in shown))


def _all(programs: Sequence[Program], rooms: Path, directory: Path, fresh: bool) -> tuple[list[Shown], str | None]:
    """What each shows, and what is to be said against the server, which clients may have made good by asking again."""
    server, shown = LiveServer(log=directory / "server.log"), []  # no arguments: the demo
    try:
        environment = environment_of(server.url, directory)
        try:
            server.wait_ready()
        except AssertionError as error:
            print(error, file=sys.stderr)  # programs say that nobody answers
        for program in programs:
            print(f"{program.name} …", file=sys.stderr, flush=True)
            shown.append(show(program, rooms, directory, environment, fresh))
            print(f"{program.name}: {shown[-1].result}", file=sys.stderr, flush=True)
    finally:
        status = server.stop()
    failed = [line for line in server.output().splitlines() if " ERROR " in line]
    return shown, f"ended with status {status}" if status else failed[0] if failed else None


def _head(machine: str) -> str:
    return (
        f"# Clients\n\n`python -m clients`, {date.today().isoformat()}, {machine}, Python {sys.version.split()[0]}: "
        "what each client did with one server that serves the demo. The programs are in [clients/programs]"
        "(../../clients/programs), one a client.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
