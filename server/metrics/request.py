"""One HTTP request as it is counted, for its model."""

import time

from server.metrics.models import Model


class RequestCounts:
    """`arrived`, and whatever else is a moment here, is of the monotonic clock, in seconds."""

    def __init__(self, model: Model, arrived: float, prompt_tokens: int) -> None:
        self._model, self._arrived = model, arrived
        self._last_token: dict[int, float] = {}  # by number of the engine's request: when its last token came
        model.counts.prompt_tokens += prompt_tokens

    def begun(self, prompt_tokens: int, cached_tokens: int, queued_s: float) -> None:
        """The engine has computed the prompt of one completion."""
        counts = self._model.counts
        counts.queued.observe(queued_s)
        counts.looked_up_tokens += prompt_tokens
        counts.cached_tokens += cached_tokens

    def token(self, number: int, at: float) -> None:
        """Of that completion, which came at that moment. There is a call for every token that the server streams."""
        counts, last = self._model.counts, self._last_token
        counts.generated_tokens += 1
        if number in last:
            counts.inter_token.observe(at - last[number])
        elif not last:
            counts.time_to_first_token.observe(at - self._arrived)
        last[number] = at

    def ended(self, finish: str, num_completions: int = 1) -> None:
        if num_completions:
            self._model.counts.requests[finish] += num_completions

    def over(self) -> None:
        """Nothing more comes for the whole request."""
        self._model.counts.duration.observe(time.monotonic() - self._arrived)
