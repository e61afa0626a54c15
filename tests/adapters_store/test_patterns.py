"""Patterns of ranks and alphas: names that are looked up give what a search for them gives."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store.errors import InvalidAdapter
from adapters_store.formats.patterns import Patterns

_LETTERS = st.text("ab._-\n", min_size=1, max_size=6)
_PATTERNS = st.one_of(
    _LETTERS, st.text("ab._-", min_size=1, max_size=5), st.sampled_from([".", "..", ".*a", "a|b", r"b\.a", "a+"])
)


def as_peft(patterns: dict[str, int], name: str) -> int:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return -1


@settings(max_examples=500)
@given(st.lists(_PATTERNS, max_size=6, unique=True), st.lists(st.text("ab._-", max_size=9), max_size=5))
def test_the_first_that_matches_is_found_as_peft_finds_it(patterns: list[str], names: list[str]) -> None:
    numbered = {pattern: number for number, pattern in enumerate(patterns)}
    found = Patterns("rank_pattern", numbered, -1, "file")
    for name in names:
        assert found.find(name) == as_peft(numbered, name), (name, patterns)


def test_as_many_names_as_modules_cost_little() -> None:
    names = [f"model.layers.{layer}.mlp.experts.{expert}.gate_proj" for layer in range(48) for expert in range(128)]
    patterns = Patterns("rank_pattern", {name: number for number, name in enumerate(names[:2000])}, -1, "file")
    begin = time.process_time()
    assert [patterns.find(name) for name in names] == [*range(2000), *[-1] * (len(names) - 2000)]
    assert time.process_time() - begin < 2


def test_what_is_no_expression_is_told_by_its_number() -> None:
    with pytest.raises(InvalidAdapter, match="^pattern number 2 of alpha_pattern in file cannot be used"):
        Patterns("alpha_pattern", {"a": 1.0, "(": 2.0}, 0.0, "file")
