"""Work that runs beside the main stream: forked from it, and joined before whoever reads what it leaves."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import TypeVar

import torch

_is_on_branch = ContextVar("is_on_branch", default=False)
R = TypeVar("R")


def is_on_branch() -> bool:
    """Whether what is launched now is launched on a branch: not on the critical path of the step."""
    return _is_on_branch.get()


class Branch:
    """A second stream, where there are streams; in a captured step a branch of the graph.

    Memory needs no further care. What is forked reads tensors that live until the join, since whoever forks holds them
    till then. What it makes lies in memory of the branch's stream, which only a later fork can be given again: a fork
    waits for all that the main stream was told before, the readers of the earlier one among it.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None  # made where the first step is computed
        self._is_forked = False

    def fork(self, launch: Callable[[], R], device: torch.device) -> R:
        """Runs `launch` beside what the main stream is told until the join. Forks do not nest.

        Where it raises there is nothing to join: what it had begun is waited for.
        """
        assert not self._is_forked
        self._is_forked = True
        token = _is_on_branch.set(True)
        try:
            if device.type != "cuda":
                return launch()
            if self._stream is None:
                self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(self._stream):
                return launch()
        except BaseException:
            self.join(device)
            raise
        finally:
            _is_on_branch.reset(token)

    def join(self, device: torch.device) -> None:
        """What the main stream is told from now on comes after what was forked."""
        assert self._is_forked
        self._is_forked = False
        if self._stream is not None and device.type == "cuda":
            torch.cuda.current_stream(device).wait_stream(self._stream)
