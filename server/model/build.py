"""What an injection is given, and what it says of what it put in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from server.model.attention import CachedLayer
from server.model.branch import Branch
from server.model.experts import RoutedExperts, Stacks
from server.model.inputs import CurrentStep
from server.model.probe import Probed
from server.model.product import Product
from server.model.site_op import SiteOps

# modules of one input, all nn.Linear -> their product; whoever calls it lets go of them
MakeProduct = Callable[[Sequence[nn.Module]], Product]
# (layer, gate_up, down, n) of the base -> stacks that begin with the same experts, and have room behind them for n
# shared ones, which are written by whoever asks, and for adapters'
MakeStacks = Callable[[int, Tensor, Tensor, int], Stacks]


@dataclass(frozen=True)
class Target:
    """A linear that adapters may act on, by its name in the base."""

    name: str
    shape: tuple[int, int]  # out, in


@dataclass(frozen=True)
class Build:
    """A model that parts of ours are put into, and where those get what they do not own."""

    model: nn.Module
    probed: Probed
    step: CurrentStep
    site_ops: Sequence[SiteOps]  # of every kind of part that acts at linears
    make_stacks: MakeStacks
    make_product: MakeProduct
    branch: Branch = field(default_factory=Branch)  # of the model's steps

    def replace(self, name: str, module: nn.Module) -> None:
        parent, _, leaf = name.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, module)


@dataclass
class Injected:
    """What was put in."""

    targets: list[Target] = field(default_factory=list)
    experts: list[RoutedExperts] = field(default_factory=list)
    layers: list[CachedLayer] = field(default_factory=list)  # in order; without memory yet
    bypassed: set[str] = field(default_factory=set)  # linears that are never called: attention goes around them
