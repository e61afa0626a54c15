"""Requests that the front waits for: counted by adapter, and found by it."""

import random

import pytest

from adapters_store.ref import AdapterRef
from server.engine.open_requests import OpenRequests

A, B = AdapterRef("a", "1", "lora"), AdapterRef("b", "2", "lora")


def test_they_are_found_by_their_number_and_by_their_weights() -> None:
    it: OpenRequests[str] = OpenRequests()
    for number, (stream, ref) in enumerate([("x", A), ("x", AdapterRef("other", "1", "lora")), ("y", B), ("z", None)]):
        it.add(number, stream, ref)
    assert it.stream(2) == "y" and it.stream(9) is None and len(it) == 4 and list(it) == [0, 1, 2, 3]
    assert (it.num_of(A), it.num_of(B)) == (2, 1)
    assert it.streams() == ["x", "y", "z"]
    assert it.end(0) and not it.end(0) and it.end(3)
    assert it.num_of(A) == 1 and it.streams() == ["x", "y"]


def test_counts_are_what_is_open() -> None:
    it, rng = OpenRequests[int](), random.Random(0)
    for number in range(500):
        it.add(number, number // 3, rng.choice([A, B, None]))
        it.end(rng.randrange(number + 1))
        it.check()
    it._users[A] += 1
    with pytest.raises(AssertionError):
        it.check()
