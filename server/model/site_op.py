"""What adapters do where a linear is: beside its own product, over the rows of each."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from server.model.mla import AbsorbedProjection
    from server.model.product import Product

# given the product y [T, sum of widths], changes it in place. A consumer of y may fuse it
Finish = Callable[[Tensor], None]


class SiteOp(Protocol):
    """What one kind of part does at one place of the model."""

    def enter(self, x: Tensor) -> Tensor:
        """What the product and the ops behind this one read in place of its input x. x itself is never changed: others
        read it too."""
        return x

    def begin(self, x: Tensor) -> Finish | None:
        """x [T, in], or [T, heads, in of a head]: what the product reads. It may run beside the product.

        None: no adapter of the step that is being computed acts here.
        """


class SiteOps(Protocol):
    """Makes the ops of one kind of part, and tells its table where they act (server/assembly.py lists them)."""

    def at_linears(self, names: Sequence[str], product: "Product", is_lm_head: bool) -> SiteOp:
        """Beside the product of the linears of these names. is_lm_head: its rows are those that are sampled."""

    def at_absorbed(self, name: str, projection: "AbsorbedProjection") -> tuple[SiteOp, SiteOp]:
        """Where queries enter the latent space through the linear `name`, and where results leave it."""


def begin_all(ops: Sequence[SiteOp], x: Tensor) -> tuple[Tensor, list[Finish]]:
    """What the product is to read, and what follows it."""
    for op in ops:
        x = op.enter(x)
    return x, [finish for op in ops if (finish := op.begin(x)) is not None]
