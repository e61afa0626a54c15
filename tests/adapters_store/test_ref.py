"""References to adapters: equal if they mean the same weights."""

import msgspec

from adapters_store.ref import AdapterRef

A, OTHER_NAME, OTHER_WEIGHTS = (AdapterRef(*it, "lora") for it in (("a", "1"), ("b", "1"), ("a", "2")))


def test_it_is_the_weights_that_they_are_compared_by() -> None:
    assert A == OTHER_NAME and not A != OTHER_NAME
    assert A != OTHER_WEIGHTS and not A == OTHER_WEIGHTS
    assert A != "a" and len({A, OTHER_NAME, OTHER_WEIGHTS}) == 2


def test_the_name_survives_a_journey() -> None:
    there = msgspec.msgpack.decode(msgspec.msgpack.encode(OTHER_NAME), type=AdapterRef)
    assert there == A and there.name == "b"
