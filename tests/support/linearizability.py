"""Whether what many clients saw of the catalogue could have happened one change at a time.

Each operation must seem to take effect at one instant between its request and its answer. The search is Wing and Gong's
("Testing and Verifying Concurrent Objects", 1993) with Lowe's memory of what was tried ("Testing for linearizability",
2017), name by name: a history is linearizable if that of each object is (Herlihy and Wing, 1990).

    name means nothing    client 1  |--- register a: 201 ---|
                          client 2      |--- register b: 409 ---|      a, then b: fine
                          client 3                                |-- read: 404 --|   a was acknowledged: no order does
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

State = tuple[str, ...]  # revisions that a name means, newest first; empty: nothing
Kind = Literal["register", "replace", "rollback", "delete", "read"]


@dataclass(frozen=True)
class Operation:
    """What one client asked and was told. `revision` is that of the weights it sent, `expected` what it sent as
    If-Match. `status` None: it was never answered, so it may have happened at any time since, or not. `seen` are the
    revisions that the answer told. Times in seconds of one clock."""

    name: str
    kind: Kind
    revision: str | None = None
    expected: str | None = None
    begin: float = 0.0
    end: float = math.inf
    status: int | None = None
    seen: State | None = None


def applied(state: State, it: Operation) -> tuple[int, State]:
    """What the operation answers where the name means `state`, and what it means after. The whole specification."""
    current = state[0] if state else None
    match it.kind:
        case "register":
            if current is None:
                return 201, _first(it, ())
            return (200, state) if current == it.revision else (409, state)
        case "replace":
            if it.expected is not None and it.expected != current:
                return 412, state
            return (200 if state else 201), _first(it, state)
        case "rollback":
            if len(state) < 2:
                return (409 if state else 404), state
            return 200, (state[1], state[0], *state[2:])
        case "delete":
            return (200, ()) if state else (404, state)
        case "read":
            return (200 if state else 404), state


def _first(it: Operation, state: State) -> State:
    assert it.revision is not None
    return (it.revision, *(known for known in state if known != it.revision))


def fits(state: State, it: Operation) -> State | None:
    """What the name means after the operation; None where it would have been answered otherwise."""
    status, after = applied(state, it)
    if it.status is None:
        return after
    if status != it.status or (it.seen is not None and it.seen != after):
        return None
    return after


def unexplained(history: Iterable[Operation], initial: State = ()) -> list[str]:
    """Names of which no order of their operations explains all answers."""
    by_name: dict[str, list[Operation]] = defaultdict(list)
    for it in history:
        by_name[it.name].append(it)
    return [name for name, mine in by_name.items() if order_of(mine, initial) is None]


def order_of(history: Sequence[Operation], initial: State = ()) -> list[Operation] | None:
    """Operations of one name in an order that explains every answer; None if there is none."""
    operations = sorted(history, key=lambda it: it.begin)
    answered = sum(1 << index for index, it in enumerate(operations) if it.status is not None)
    seen: set[tuple[int, State]] = set()
    # (done, state, who could be next); the operation that led to each is in `order`
    stack = [(0, initial, _next(operations, 0))]
    order: list[Operation] = []
    while stack:
        done, state, left = stack[-1]
        if done & answered == answered:
            return order
        for index in left:  # goes on where it stopped
            after = fits(state, operations[index])
            reached = done | 1 << index
            if after is not None and (reached, after) not in seen:
                seen.add((reached, after))
                order.append(operations[index])
                stack.append((reached, after, _next(operations, reached)))
                break
        else:
            stack.pop()
            if order:
                order.pop()
    return None


def _next(operations: Sequence[Operation], done: int) -> Iterator[int]:
    """Those that began before every one that is left had ended: any of them may have been the first. `operations` in
    order of their beginnings."""
    first_end, found = math.inf, []
    lowest = (~done & (done + 1)).bit_length() - 1
    for index in range(lowest, len(operations)):
        it = operations[index]
        if it.begin > first_end:
            break  # so has every later one, and its end
        if not done >> index & 1:
            first_end = min(first_end, it.end)
            found.append(index)
    return iter(found)


def states_after(initial: State, operations: Sequence[Operation]) -> set[State]:
    """What a name may mean after operations that one client sent one after another, the last perhaps unanswered.

    Raises AssertionError where an answer does not follow from those before."""
    state = initial
    for it in operations:
        after = fits(state, it)
        assert after is not None, f"{it} was answered where the name meant {state}"
        if it.status is None:
            assert it is operations[-1]
            return {state, after}
        state = after
    return {state}
