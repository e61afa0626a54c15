"""The checker of recorded histories: it can say no, and says what trying every order says."""

import itertools
import random
from collections.abc import Sequence

import pytest

from tests.support.linearizability import Operation, State, applied, fits, order_of, states_after, unexplained


def op(kind: str, begin: float, end: float, status: int | None, revision: str | None = None, seen: State | None = None,
       expected: str | None = None) -> Operation:  # fmt: skip
    return Operation("x", kind, revision, expected, begin, end, status, seen)  # type: ignore[arg-type]


IMPOSSIBLE = {
    "an acknowledged registration that is not seen": [
        op("register", 0, 1, 201, "a"), op("read", 2, 3, 404)],
    "two that both won": [
        op("register", 0, 5, 201, "a"), op("register", 0, 5, 201, "b")],
    "old weights after a replacement was acknowledged": [
        op("register", 0, 1, 201, "a"), op("replace", 2, 3, 200, "b"), op("read", 4, 5, 200, seen=("a",))],
    "what was seen is gone and back": [
        op("register", 0, 1, 201, "a"), op("replace", 2, 9, 200, "b"),
        op("read", 3, 4, 200, seen=("b", "a")), op("read", 5, 6, 200, seen=("a",))],
    "both swaps of the same revision": [
        op("register", 0, 1, 201, "a"), op("replace", 2, 5, 200, "b", expected="a"),
        op("replace", 2, 5, 200, "c", expected="a")],
    "a lost update": [
        op("register", 0, 1, 201, "a"), op("replace", 2, 5, 200, "b"), op("replace", 2, 5, 200, "c"),
        op("read", 6, 7, 200, seen=("c", "a"))],
    "a change that nobody asked for": [op("read", 0, 1, 200, seen=("a",))],
}  # fmt: skip
POSSIBLE = {
    "a read beside a change may see either": [
        op("register", 0, 1, 201, "a"), op("replace", 2, 9, 200, "b"),
        op("read", 3, 4, 200, seen=("a",)), op("read", 5, 6, 200, seen=("b", "a"))],
    "one wins": [op("register", 0, 5, 201, "a"), op("register", 1, 5, 409, "b")],
    "what was never answered may have happened": [
        op("register", 0, float("inf"), None, "a"), op("read", 5, 6, 200, seen=("a",))],
    "or not": [op("register", 0, float("inf"), None, "a"), op("read", 5, 6, 404)],
    "and back": [
        op("register", 0, 1, 201, "a"), op("replace", 2, 3, 200, "b"), op("rollback", 4, 5, 200, seen=("a", "b")),
        op("delete", 6, 7, 200), op("delete", 6, 7, 404)],
}  # fmt: skip


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_it_refuses(what: str) -> None:
    assert unexplained(IMPOSSIBLE[what]) == ["x"]


@pytest.mark.parametrize("what", POSSIBLE)
def test_it_accepts(what: str) -> None:
    assert order_of(POSSIBLE[what]) is not None


def by_every_order(history: Sequence[Operation]) -> bool:
    def works(order: Sequence[Operation]) -> bool:
        state: State | None = ()
        for place, it in enumerate(order):
            if any(later.end < it.begin for later in order[place + 1 :]):
                return False
            state = fits(state, it)
            if state is None:
                return False
        return True

    return any(works(order) for order in itertools.permutations(history))


def test_it_says_what_trying_every_order_says() -> None:
    """Histories that happened, some of them with an answer changed afterwards."""
    rng = random.Random(3)
    verdicts = []
    for _ in range(250):
        state: State = ()
        history = []
        for place in range(6):
            kind = rng.choice(["register", "replace", "rollback", "delete", "read"])
            it = op(kind, place - rng.uniform(0, 3), place + rng.uniform(0, 3), None, rng.choice("ab"))
            status, state = applied(state, it)
            history.append(op(kind, it.begin, it.end, status, it.revision, state if status < 300 else None))
        if rng.random() < 0.7:
            place = rng.randrange(6)
            it = history[place]
            history[place] = op(it.kind, it.begin, it.end, rng.choice([200, 201, 404, 409]), it.revision)
        verdicts.append(order_of(history) is not None)
        assert verdicts[-1] == by_every_order(history), history
    assert 50 < sum(verdicts) < 200


def test_what_one_client_did_leaves_one_state_or_two() -> None:
    first, second = op("register", 0, 1, 201, "a"), op("replace", 1, 2, None, "b")
    assert states_after((), [first]) == {("a",)}
    assert states_after((), [first, second]) == {("a",), ("b", "a")}
    with pytest.raises(AssertionError, match="was answered where the name meant"):
        states_after(("a",), [first])
