"""Which cases of a test always run, and which are more of the same (`make thorough`)."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from _pytest.mark import ParameterSet


def always(cases: Iterable[Any], *those: Any) -> list[ParameterSet]:
    """All cases, of which all but `those` are thorough. A tuple is one case of several parameters."""
    cases = list(cases)
    assert all(it in cases for it in those), "there is no such case"
    return [pytest.param(*_values(it), marks=() if it in those else pytest.mark.thorough) for it in cases]


def _values(case: Any) -> Sequence[Any]:
    return case if isinstance(case, tuple) else (case,)
