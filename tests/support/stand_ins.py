"""Steps by kernels where there are no graphs: the same computations on the same memory, in their place."""

from collections.abc import Callable, Sequence

import pytest
import torch

from kernels.adapter_rows import ShapeKey
from server.model.cuda_graphs import GraphedForward
from server.model.forward import KernelForward
from tests.support.engine_harness import Engine
from tests.support.kernel_device import DEVICE

SMALL = dict(num_hidden_layers=2, hidden_size=32, intermediate_size=40, vocab_size=97)
PLACE = torch.device(DEVICE)
stands_in = pytest.mark.skipif(DEVICE == "cuda", reason="stands in for graphs, which test_a_step_by_kernels has here")


class StandIns:
    """Where there are no graphs: the same computations on the same memory, in the place of an engine's forward."""

    def __init__(
        self, engine: Engine, sizes: list[int], shapes: list[ShapeKey], captures: bool = True,
        mixed: Sequence[tuple[int, int]] = (),
    ) -> None:  # fmt: skip
        """sizes: numbers of rows. captures: all graphs, before anything else. mixed: (rows, sequences) of steps with
        prompts."""
        eager = engine.assembly.runner.forward
        assert isinstance(eager, KernelForward)
        self.num_replays = 0
        self.forward = GraphedForward(eager, torch.empty(sizes[-1], SMALL["vocab_size"]), shapes, self._capture)
        self.forward.decode_sizes, self.forward.mixed_sizes = sizes, list(mixed)
        engine.assembly.runner.forward = self.forward
        with torch.inference_mode():
            for key in self.forward.keys() if captures else ():
                self.forward.capture(key)

    def _capture(self, compute: Callable[[], object]) -> Callable[[], object]:
        def replay() -> None:
            self.num_replays += 1
            compute()

        compute()
        return replay
