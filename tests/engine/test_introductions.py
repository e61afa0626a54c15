"""Which adapters the engine is told of, and when it is told to forget them."""

import msgspec
import pytest

from adapters_store.errors import AdapterNotFound
from adapters_store.ref import AdapterRef
from server.engine.introductions import Introductions
from server.engine.messages import PackedAddAdapter, RemoveAdapter

A, B, C, D = (AdapterRef(name, f"revision of {name}", "lora") for name in "abcd")


class Front:
    """What describes adapters, what uses them, and what it has said of them: +a, -a."""

    def __init__(self, most_known: int = 2) -> None:
        self.said: list[str] = []
        self.used: set[AdapterRef] = set()
        self.pinned: set[AdapterRef] = set()
        self.introductions = Introductions(self, self._send, self.used.__contains__, most_known)

    def packed(self, ref: AdapterRef) -> PackedAddAdapter:
        if ref == D:
            raise AdapterNotFound(ref.name)
        return PackedAddAdapter(ref, msgspec.Raw(), pinned=ref in self.pinned)

    def _send(self, message: PackedAddAdapter | RemoveAdapter) -> None:
        self.said.append(("+" if isinstance(message, PackedAddAdapter) else "-") + message.ref.name)

    def introduce(self, *refs: AdapterRef) -> list[str]:
        self.said.clear()
        self.introductions.introduce(refs)
        return self.said


def test_one_is_told_of_once_under_whatever_name() -> None:
    front = Front()
    assert front.introduce(A, A, AdapterRef("x", A.revision, "lora")) == ["+a"]
    assert front.introduce(A) == [] and A in front.introductions and len(front.introductions) == 1


def test_the_least_recently_used_is_forgotten_and_told_of_again_when_it_is_used() -> None:
    front = Front()
    front.introduce(A, B)
    front.introduce(A)
    assert front.introduce(C) == ["+c", "-b"]
    assert front.introduce(B) == ["+b", "-a"]


def test_what_is_used_is_not_forgotten_though_there_be_more_than_should() -> None:
    front = Front()
    front.introduce(A, B)
    front.used |= {A, B}
    assert front.introduce(C) == ["+c"] and len(front.introductions) == 3
    front.used.remove(B)
    assert front.introduce(C) == ["-b"]
    assert Front(most_known=1).introduce(A, B, C) == ["+a", "+b", "+c"]  # they are about to be used together


def test_what_is_pinned_is_not_forgotten_until_it_is_pinned_no_longer() -> None:
    front = Front()
    front.pinned.add(A)
    front.introduce(A, B)
    assert front.introduce(C) == ["+c", "-b"] and front.introduce(A) == []
    front.pinned.clear()
    front.introductions.again(A)
    assert front.introduce(C, B) == ["+b", "-a"]


def test_one_of_which_something_has_changed_is_told_of_again() -> None:
    front = Front()
    front.introduce(A)
    for ref in (A, B, C):
        front.introductions.again(ref)
    assert front.said == ["+a", "+a", "+b", "+c", "-a"]


def test_one_that_was_removed_is_told_of_again_when_it_is_used() -> None:
    front = Front()
    front.introduce(A)
    front.introductions.forget(A)
    front.introductions.forget(B)
    assert A not in front.introductions and front.introduce(A) == ["+a"]


def test_one_that_is_not_described_is_not_known() -> None:
    front = Front()
    with pytest.raises(AdapterNotFound):
        front.introduce(D)
    assert D not in front.introductions and front.said == []
