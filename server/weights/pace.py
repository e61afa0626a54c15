"""Work of the interpreter on another thread, so that the step loop hardly notices."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

_AT_A_TIME_S = 0.0001
_REST_S = 0.0003  # a sleep of none would take the interpreter back before the other thread has woken

T = TypeVar("T")


def unhurried(items: Iterable[T]) -> Iterator[T]:
    """The same, with rests between. Else whoever waits for the interpreter gets it after 5 ms (sys.getswitchinterval):
    as long as many a step."""
    begin = time.perf_counter()
    for item in items:
        if time.perf_counter() - begin > _AT_A_TIME_S:
            time.sleep(_REST_S)
            begin = time.perf_counter()
        yield item
