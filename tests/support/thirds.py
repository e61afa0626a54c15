"""What is too much for every CI run: each takes another third of it, and `make thorough` all."""

import os
from collections.abc import Iterable
from datetime import UTC, datetime

import pytest
from _pytest.mark import ParameterSet

# set once for all processes of a run; a third that failed can be run again by its number
THIRD = int(os.environ.setdefault("HEDDLE_THIRD", str(datetime.now(UTC).toordinal() % 3)))


def a_third(names: Iterable[str], always: Iterable[str] = ()) -> list[ParameterSet]:
    """Parameters of a test: today's third, and `always`; the rest is marked thorough."""
    kept = set(always)
    return [
        pytest.param(name, marks=[] if index % 3 == THIRD or name in kept else pytest.mark.thorough)
        for index, name in enumerate(names)
    ]
