"""Waiting for what comes in its own time, as long as that takes on a slow and busy machine."""

import asyncio
import time
from collections.abc import Callable

WITHIN_S = 60.0


def eventually(condition: Callable[[], object], within_s: float = WITHIN_S) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"it did not come to that within {within_s:g} s"
        time.sleep(0.005)


async def soon(condition: Callable[[], object], within_s: float = WITHIN_S) -> None:
    """The same where an event loop must go on meanwhile."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"it did not come to that within {within_s:g} s"
        await asyncio.sleep(0.005)
