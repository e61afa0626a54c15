"""The requests that run and whose tokens a grammar constrains, and those of them that wait for their masks."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from server.engine.masks import Masks
from server.engine.messages import MaskStats
from server.engine.plan import Output
from server.engine.request import Fault, Lane, Request, Status, ToldOfPrompt


class Failed(NamedTuple):
    request: Request
    reason: str
    fault: Fault | None


class Constrained:
    """`late`: by id, those whose mask was not there when their last token was computed, and is not there yet. They have
    nothing to do but to wait."""

    def __init__(self, masks: Masks) -> None:
        self._masks = masks
        self._requests: dict[int, Request] = {}
        self.late: set[int] = set()
        self._num_late = 0

    def start(self, request: Request) -> None:
        """It runs, perhaps again: what it has generated is gone through once more."""
        if request.is_constrained:
            assert request.grammar is not None
            self._requests[request.id] = request
            self._masks.open(request.id, request.grammar, request.first.tokens[request.first.prompt_len :])

    def stop(self, request: Request) -> None:
        if self._requests.pop(request.id, None) is not None:
            self.late.discard(request.id)
            self._masks.close(request.id)

    def poll(self) -> list[Failed]:
        """See whose masks have come. Those whose masks will not."""
        if not self._requests:
            return []
        broken = self._masks.poll()
        self.late = {it for it in self.late if it in self._requests and not self._masks.is_ready(it)}
        return [
            Failed(self._requests[it.request_id], it.reason, Fault.GRAMMAR if it.is_its_own else None) for it in broken
        ]

    def late_among(self, outputs: Mapping[Lane, Output]) -> set[Request]:
        """Those for which a step had no mask."""
        return {lane.request for lane, it in outputs.items() if it.is_late} if self._requests else set()

    def was_late(self, request: Request, told: ToldOfPrompt | None) -> None:
        """Its mask was not there when its last tokens were computed: they will be computed once more. What was `told`
        of its prompt is kept until it has a token. One that gave way meanwhile computes everything once more."""
        self._num_late += 1
        request.told_early = told or request.told_early
        if request.status is not Status.RUNNING:
            return
        self.late.add(request.id)
        for lane in request.lanes:
            lane.num_computed_tokens -= 1

    def took(self, request: Request, token: int) -> None:
        """It goes on with this token."""
        if request.id in self._requests:
            self._masks.accept(request.id, token)

    @property
    def stats(self) -> MaskStats:
        return MaskStats(*self._masks.made, self._num_late)

    def check(self, running: Sequence[Request]) -> None:
        """Recompute what is kept incrementally."""
        assert self._requests == {it.id: it for it in running if it.is_constrained}
        assert self.late <= self._requests.keys()
