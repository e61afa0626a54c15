"""A branch that something fails beside is joined, and the next step forks it again."""

import pytest
import torch
from torch import Tensor, nn

from kernels.lora.delta import Delta
from server.model.branch import Branch, is_on_branch
from server.model.linears import AdaptedLinear

CPU = torch.device("cpu")


class Watched(Branch):
    def __init__(self) -> None:
        super().__init__()
        self.joins = 0

    def join(self, device: torch.device) -> None:
        super().join(device)
        self.joins += 1


def fail(*_: object) -> Delta:
    raise RuntimeError("no memory")


class Defers:
    """Stands in for a SiteOp."""

    def __init__(self, is_sound: bool) -> None:
        self._is_sound = is_sound

    def begin(self, x: Tensor) -> None:
        raise AssertionError

    def defers(self, x: Tensor) -> bool:
        return True

    def deferred(self, x: Tensor) -> Delta:
        assert is_on_branch()
        return Delta(x, x, x, None, None) if self._is_sound else fail()  # type: ignore[arg-type]


class Fails(nn.Module):
    widths: tuple[int, ...] = (4,)

    def forward(self, x: Tensor) -> Tensor:
        assert not is_on_branch()
        fail()
        return x


@pytest.mark.parametrize("launch_is_sound", [True, False])
def test_what_fails_between_fork_and_join(launch_is_sound: bool) -> None:
    branch = Watched()
    linear = AdaptedLinear(Fails(), [Defers(launch_is_sound)], branch)  # type: ignore[arg-type]
    for attempt in (1, 2):
        with pytest.raises(RuntimeError, match="no memory"):
            linear.deferred(torch.ones(2, 3))
        assert branch.joins == attempt and not is_on_branch()
    assert branch.fork(is_on_branch, CPU)
    branch.join(CPU)
