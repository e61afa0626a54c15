"""Which adapters are served, and when the residency is told that nobody wants one any more."""

from typing import Any

import pytest

from adapters_store.parts import AdapterPackage
from adapters_store.ref import AdapterRef
from server.engine.adapter_users import AdapterUsers
from server.engine.messages import AdapterGone
from server.engine.request import LaneSpec, Request, Sampling

A, B = AdapterRef("a", "1", "lora"), AdapterRef("b", "2", "lora")


class Told:
    """A residency that only listens."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def register(self, *what: Any) -> None:
        self.told.append(("register", *what))

    def unpin(self, *what: Any) -> None:
        self.told.append(("unpin", *what))

    def forget(self, *what: Any) -> int:
        self.told.append(("forget", *what))
        return 7


def package(files: str = "") -> AdapterPackage:
    return AdapterPackage("lora", files, "1", (), ())


def request(*adapters: AdapterRef | None) -> Request:
    return Request(0, [LaneSpec([1], adapter) for adapter in adapters], 1, Sampling())


def users(*refs: AdapterRef) -> tuple[AdapterUsers, list[tuple[Any, ...]]]:
    residency = Told()
    it = AdapterUsers(residency)  # type: ignore[arg-type]
    for ref in refs:
        it.register(ref, package())
    residency.told.clear()
    return it, residency.told


def test_what_was_registered_is_served_until_it_is_removed() -> None:
    it, told = users()
    assert not it.is_served(A)
    it.register(A, package("here"))
    assert it.is_served(A) and not it.is_served(B)
    assert told == [("register", A, package("here"), False)]
    it.remove(A)
    assert not it.is_served(A) and told[1:] == [("unpin", A), ("forget", A)]
    it.check([])


def test_one_that_is_held_is_forgotten_when_the_last_that_holds_it_ends() -> None:
    it, told = users(A, B)
    first, second = request(A), request(None, A, B, A)
    it.hold(first)
    it.hold(second)
    it.check([first, second])
    it.remove(A)
    assert not it.is_served(A) and it.is_served(B)
    it.let_go(second)
    assert told == [("unpin", A)] and it.take_gone() == []
    it.check([first])
    it.let_go(first)
    assert told == [("unpin", A), ("forget", A)]
    it.check([])
    assert it.take_gone() == [AdapterGone(A, 7)] and it.take_gone() == []
    it.remove(A)  # nothing is left to remove
    assert it.take_gone() == [AdapterGone(A, 0)]
    assert told == [("unpin", A), ("forget", A)] and it.is_served(B)


def test_one_that_two_lanes_of_a_request_hold_is_forgotten_once() -> None:
    it, told = users(A)
    both = request(A, A)
    it.hold(both)
    it.remove(A)
    it.let_go(both)
    assert told == [("unpin", A), ("forget", A)]


def test_registering_again_lifts_a_removal_and_keeps_the_count() -> None:
    it, told = users(A)
    old = request(A)
    it.hold(old)
    it.remove(A)
    it.register(A, package("moved"))
    assert it.is_served(A) and told == [("unpin", A), ("register", A, package("moved"), False)]
    it.check([old])
    it.let_go(old)
    assert it.is_served(A) and ("forget", A) not in told and it.take_gone() == []
    it.check([])


def test_what_is_not_served_cannot_be_held() -> None:
    it, _ = users(A)
    it.hold(request(A))
    it.remove(A)
    for ref in (A, B):
        with pytest.raises(AssertionError):
            it.hold(request(ref))


def test_its_check_finds_holders_that_it_was_not_told_of() -> None:
    it, _ = users(A)
    it.check([])
    with pytest.raises(AssertionError):
        it.check([request(A)])
    it._removed.add(A)  # nobody holds it: it had to be forgotten
    with pytest.raises(AssertionError):
        it.check([])
