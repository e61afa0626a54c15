"""How much each adapter has been served, in tokens: whoever had least is next.

Virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): a counter grows by the
tokens that its adapter was served, divided by the adapter's weight. So two that always have something waiting are
served in proportion to their weights. A token of a prompt counts as one if it was computed, and not at all if it was
found in the prefix cache or is computed again after a preemption; a generated one counts as two, since it takes a step.

Nobody saves up. There is a *floor*, the counter of whoever was chosen last: an adapter that had nothing waiting is
lifted to it when it comes back, and one that had to be passed over is lifted to it when its turn comes after all. This
is the virtual time of start-time fair queueing (Goyal et al., SIGCOMM 1996), and costs no look at the others.
"""

from collections.abc import Collection
from heapq import heapify, heappop, heappush

from server.engine.request import Lane, Request

_GENERATED = 2.0
MOST_REMEMBERED = 1024  # adapters that have nothing at work and were served more than others


class TokenCounters:
    """By adapter's name ("": the base). Kept of those at work, and of those that left ahead of the floor, until it has
    come up to them: else whoever sends a thousand requests, waits for them and sends a thousand more would start anew
    each time."""

    def __init__(self) -> None:
        self._counters: dict[str, float] = {}
        self._floor = 0.0
        self._away: list[tuple[float, str]] = []  # a heap of those that have nothing at work

    def of(self, name: str) -> float:
        return self._counters[name]

    def ahead(self, names: Collection[str], num_tokens: float) -> set[str]:
        """Those of them that were served so many tokens more than another."""
        least = min(map(self.of, names), default=0.0)
        return {name for name in names if self.of(name) > least + num_tokens}

    def come(self, name: str) -> None:
        """It had nothing waiting, and now has."""
        self._counters[name] = max(self._counters.get(name, 0.0), self._floor)

    def choose(self, name: str) -> None:
        """A request of it is about to start: nobody who comes now was served less."""
        self._floor = self._counters[name] = max(self._counters[name], self._floor)

    def leave(self, name: str) -> None:
        """It has nothing at work any more."""
        heappush(self._away, (self._counters[name], name))

    def settle(self, at_work: Collection[str]) -> None:
        """Forget those that are away and not ahead of anybody. Called once a step, with all that are at work."""
        if not at_work:  # counters are only compared
            self._counters.clear()
            self._away.clear()
            self._floor = 0.0
        while self._away and (self._away[0][0] <= self._floor or len(self._away) > MOST_REMEMBERED):
            counter, name = heappop(self._away)
            if name not in at_work and self._counters.get(name) == counter:
                del self._counters[name]

    # -- what is served -----------------------------------------------------------

    def charge_prompt(self, lane: Lane, num_tokens: int) -> None:
        """So many more tokens of the lane are computed. What it had computed before does not count again."""
        end = min(lane.num_computed_tokens + num_tokens, lane.prompt_len)
        new = end - max(lane.num_computed_tokens, lane.num_charged_tokens)
        if new > 0:
            lane.num_charged_tokens = end
            self._counters[lane.request.account] += new / lane.request.weight

    def charge_generated(self, request: Request, num_tokens: int) -> None:
        self._counters[request.account] += _GENERATED * num_tokens * len(request.lanes) / request.weight

    def check(self, at_work: Collection[str]) -> None:
        away = {name for counter, name in self._away if self._counters.get(name) == counter}
        assert set(at_work) <= set(self._counters) <= set(at_work) | away
        assert all(counter >= 0.0 for counter in self._counters.values())
        ordered = self._away.copy()
        heapify(ordered)
        assert ordered == self._away
