"""Runs one client's program, in that client's own environment: ``python -P checks.py PROGRAM PACKAGE RESULTS``.

Each public function of the program is a check, in the order in which they stand there, and its docstring says what it
shows. One that raises has failed, and the next one runs. RESULTS gets a line of JSON when a check ends, so what was
found before a crash or a kill is not lost. Only the standard library: the environment is the client's.
"""

import asyncio
import importlib.metadata
import importlib.util
import inspect
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any

SECONDS = 240  # for one check


class OutOfTime(BaseException):
    """Not an Exception: clients catch those, and try again."""


def main() -> None:
    program, package, results = sys.argv[1:]
    with open(results, "w", encoding="utf-8") as file:

        def tell(**line: object) -> None:
            print(json.dumps(line), file=file, flush=True)

        tell(version=importlib.metadata.version(package))
        signal.signal(signal.SIGALRM, _out_of_time)
        for check in _checks(program):
            begin = time.monotonic()
            problem = _problem_of(check)
            tell(what=_shown_by(check), problem=problem, seconds=round(time.monotonic() - begin, 2))
        tell(ended=True)


def _checks(path: str) -> list[Callable[[], Any]]:
    spec = importlib.util.spec_from_file_location("program", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a program")
    module = importlib.util.module_from_spec(spec)
    sys.modules["program"] = module
    spec.loader.exec_module(module)
    return [
        it for name, it in vars(module).items()
        if inspect.isfunction(it) and it.__module__ == "program" and not name.startswith("_") and it.__doc__
    ]  # fmt: skip


def _problem_of(check: Callable[[], Any]) -> str | None:
    signal.alarm(SECONDS)
    try:
        if inspect.iscoroutinefunction(check):
            asyncio.run(check())
        else:
            check()
    except OutOfTime:
        return f"not done after {SECONDS} seconds"
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        return _told(error)
    finally:
        signal.alarm(0)
    return None


def _told(error: BaseException) -> str:
    """With the line of the program that it came from: an assertion says little by itself."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name and frame.line]
    own = [frame for frame in frames if frame.filename == sys.argv[1]]
    where = f" in line {own[-1].lineno}: {own[-1].line}" if own else ""
    return f"{type(error).__name__}: {str(error)[:400]}{where}"


def _shown_by(check: Callable[[], Any]) -> str:
    return " ".join((check.__doc__ or "").split()).rstrip(".")


def _out_of_time(number: int, frame: FrameType | None) -> None:
    raise OutOfTime


if __name__ == "__main__":
    main()
