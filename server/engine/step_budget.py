"""How many tokens a step may compute: fewer of prompts while others wait for their next token.

A step of 512 tokens of a prompt takes many times as long as one in which everybody decodes, and whoever decodes waits
for it. So while lanes decode, prompts get what a step has room for until it is as long as a target. What that is in
tokens is learned from how long steps took. No clock is read here: the loop says how long each step was, a simulation
says what it likes, and as long as nobody says anything a step has its whole budget.
"""

from collections.abc import Sequence
from typing import NamedTuple

from server.engine.plan import Plan
from server.engine.prompts import Load

# times a step without prompts that one with them may take, whatever the target is: on a slow device, or beside many who
# decode, prompts would otherwise get nothing
_STRETCH = 2.5
_MANY_PROMPTS = 1 / 6  # for each lane that decodes, beyond which the target grows with them
_MOST_CHUNKS = 4  # prompts that share a step: each leaves the others half (prompts.py)
_LEAST_PROMPT_TOKENS = 16  # a step, so that a wrong guess at their cost is not for ever
_GROWTH = 2.0  # from one step to the next, so that a wrong guess is one step's
_SCALES = (64.0, 65536.0, 1.0, 8.0, 1.0)  # of tokens, seen, chunks, singles, 1
_FADES = 0.97  # the weight of a step when the next one comes
_STAYS = 1e-3  # the weight of what was known, as a part of that of recent steps
_ROUNDS = 8
_MOST_SURPRISE = 3.0  # times what was expected: somebody else had the machine


class Work(NamedTuple):
    """What a step computes, as its time depends on it."""

    singles: int  # lanes that compute one token, as all do that decode
    chunks: int  # the others, which are of prompts
    tokens: int  # of these
    seen: int  # keys before its chunk, summed over these tokens


def work_of(plan: Plan) -> Work:
    singles = chunks = tokens = seen = 0
    for _, start, num_tokens, _ in plan:
        if num_tokens == 1:
            singles += 1
        else:
            chunks += 1
            tokens += num_tokens
            seen += num_tokens * start
    return Work(singles, chunks, tokens, seen)


class StepTimes:
    """What steps cost: a sum of so much a token of a prompt, a key that it sees, a chunk, a single and a step.

    None of the five is below zero; they are least squares over recent steps, in which a step counts the less the longer
    it is ago, and errors are relative, else long steps alone would count. What recent steps say nothing of stays as it
    was known.
    """

    def __init__(self) -> None:
        self._costs = [0.0] * len(_SCALES)
        self._products = [[0.0] * len(_SCALES) for _ in _SCALES]  # of features with each other, over steps
        self._sums = [0.0] * len(_SCALES)

    @property
    def knows_prompts(self) -> bool:
        return self._costs[0] + self._costs[1] > 0.0

    def of_decodes(self, decodes: int) -> float:
        """Seconds of a step of nothing else."""
        return self._of(_features(Work(decodes, 0, 0, 0)))

    def of_chunks(self, chunks: int) -> float:
        """Seconds by which a step is longer for so many, without their tokens."""
        return self._costs[2] / _SCALES[2] * chunks

    def of_prompt_token(self, position: float) -> float:
        """Seconds of one more token of a prompt of which so many are computed."""
        return self._costs[0] / _SCALES[0] + self._costs[1] / _SCALES[1] * position

    def learn(self, work: Work, seconds: float) -> None:
        features = _features(work)
        expected = self._of(features)
        if expected:
            seconds = min(seconds, _MOST_SURPRISE * expected)
        if seconds > 0.0:
            row = [it / seconds for it in features]
            for one, products in zip(row, self._products, strict=True):
                products[:] = [_FADES * it + one * other for it, other in zip(products, row, strict=True)]
            self._sums = [_FADES * it + one for it, one in zip(self._sums, row, strict=True)]
            self._solve()

    def _of(self, features: Sequence[float]) -> float:
        return sum(cost * it for cost, it in zip(self._costs, features, strict=True))

    def _solve(self) -> None:
        """By coordinate descent from what was known before: steps are many, so each need not go all the way."""
        costs, products = self._costs, self._products
        stays = _STAYS * sum(row[index] for index, row in enumerate(products))
        known = costs.copy()
        for _ in range(_ROUNDS):
            for index, row in enumerate(products):
                others = sum(it * cost for it, cost in zip(row, costs, strict=True)) - row[index] * costs[index]
                best = (self._sums[index] + stays * known[index] - others) / (row[index] + stays)
                costs[index] = max(0.0, best)


def _features(work: Work) -> tuple[float, ...]:
    """All of about one size."""
    it = (work.tokens, work.seen, work.chunks, work.singles, 1.0)
    return tuple(value / scale for value, scale in zip(it, _SCALES, strict=True))


class StepBudget:
    """`most` tokens a step, and while others decode as many as make it `target_s` seconds long, or 2.5 times as long as
    a step without prompts where that is more. A target of 0 is none."""

    def __init__(self, most: int, target_s: float = 0.0) -> None:
        self._most, self._target_s = most, target_s
        self._allowed = float(most)  # tokens of prompts in the last step that was cut
        self.times = StepTimes()

    @property
    def has_target(self) -> bool:
        """Else a step has its whole budget, whatever it took."""
        return self._target_s > 0.0

    def took(self, work: Work, seconds: float) -> None:
        """A step of that took so long."""
        if self.has_target:
            self.times.learn(work, seconds)

    def tokens(self, load: Load) -> int:
        """Of the next step.

        Where many wait for their first token, beside few who wait for their next one, the target grows in proportion:
        calm for few is not bought with a long wait for many. It does not grow for those whose adapters were served
        more than others: if all prompts are theirs, a step is stretched, and that is all. Nor are chunks so small that
        they cost more than what is in them.
        """
        if not (self.has_target and load.decodes and load.prompts and self.times.knows_prompts):
            return self._most
        quiet, chunks = self.times.of_decodes(load.decodes), self.times.of_chunks(min(load.prompts, _MOST_CHUNKS))
        target = max(self._target_s if load.due else 0.0, _STRETCH * quiet)
        target *= max(1.0, load.due / (_MANY_PROMPTS * load.decodes))
        room = max(target - quiet - chunks, chunks) / max(1e-9, self.times.of_prompt_token(load.position))
        self._allowed = max(_LEAST_PROMPT_TOKENS, min(self._most, room, _GROWTH * self._allowed))
        return int(min(self._most, load.decodes + self._allowed))
