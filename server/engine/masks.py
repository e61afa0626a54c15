"""Which tokens a grammar allows next: the contract between the engine and who makes the masks.

Masks are made beside the steps, in a process of its own (server/grammars/): while the model computes the logits behind
a token, the mask of what may follow it is made. Where it comes too late, its request alone gets no token from the step,
computes its last token again when the mask is there, and nobody else has waited.

    step n      ... token t chosen -> accept(t)        mask after t is being made
    step n + 1  t computed; collect() -> mask           chosen from what it allows
                            collect() -> nothing: late  the others' tokens are chosen, t is computed once more
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

# a bit for each token id, in 32-bit words, the lowest bit first; 1: it may come next. Good until the next `accept`
Mask = memoryview


class Broken(NamedTuple):
    """Why no more masks come for a request. `is_its_own`: its grammar is too much at this point, and would be again."""

    request_id: int
    reason: str
    is_its_own: bool


class Made(NamedTuple):
    """Masks, and the seconds of a processor that they took."""

    num: int = 0
    seconds: float = 0.0


class MaskSource(Protocol):
    """Where a step's masks come from."""

    def collect(
        self, request_ids: Sequence[int], is_computing: Callable[[], bool], may_wait: bool
    ) -> Mapping[int, Mask]:
        """The masks of those that are there, of requests that are open. Waits for the others while the device
        `is_computing` anyway, and for a moment beyond where it `may_wait`: nobody else is in the step."""


class Masks(MaskSource, Protocol):
    """One mask for each open request: of what may follow all tokens that it has accepted."""

    def open(self, request_id: int, grammar: str, tokens: Sequence[int]) -> None:
        """Make masks for the request from now on, the first one, behind these tokens, at once. `grammar`: as
        server/grammars words it."""

    def accept(self, request_id: int, token: int) -> None:
        """The request's next token, which its mask allowed; the mask of what follows is made."""

    def close(self, request_id: int) -> None:
        """Its masks are wanted no more, and nothing is said of it any more. One that broke may be closed already."""

    def is_ready(self, request_id: int) -> bool:
        """Whether its mask is there, as of the last `poll` or `collect`."""

    @property
    def made(self) -> Made:
        """Since the start."""

    def poll(self) -> list[Broken]:
        """Take in what has come. Those that broke since the last call; they are closed."""

    def stop(self) -> None:
        """Nobody wants any more."""
