"""The command line: `heddle serve` and the commands beside it, each a file in server/commands. Dispatches, and tells of
what was foreseen in one line."""

import argparse
import os
import sys

from adapters_store.errors import clean
from server.commands import adapters, base_id, doctor, serve, store
from server.exits import EXIT_REFUSED, EXIT_STOPPED_EARLY, FORESEEN, status_of
from server.version import VERSION


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
        return status
    except FORESEEN as error:
        mark = "\x1b[1;31mheddle:\x1b[0m" if sys.stderr.isatty() else "heddle:"
        print(mark, clean(str(error)), file=sys.stderr)
        return status_of(error)
    except KeyboardInterrupt:
        return EXIT_STOPPED_EARLY
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains as it ends
        return EXIT_REFUSED


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="heddle",
        description="One frozen base model, many LoRA and ESFT adapters decoded in the same batch, over OpenAI's API.",
    )
    parser.add_argument("--version", action="version", version=f"heddle {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (serve, adapters, store, base_id, doctor):
        command.add_to(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
