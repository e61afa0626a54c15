"""What is too much for every CI run: each takes another third of it, and `make thorough` all."""

import os
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from _pytest.mark import ParameterSet

from tests.support.breadth import always

# set once for all processes of a run; a third that failed can be run again by its number
THIRD = int(os.environ.setdefault("HEDDLE_THIRD", str(datetime.now(UTC).toordinal() % 3)))


def a_third(names: Iterable[str], always_too: Sequence[str] = ()) -> list[ParameterSet]:
    """Parameters of a test: today's third of the names and `always_too`; the rest is marked thorough."""
    names = list(names)
    return always(names, *dict.fromkeys([*names[THIRD::3], *always_too]))
