"""What adapters do where a linear is: beside its own product, over the rows of each."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from kernels.lora.delta import Delta
from server.model.inputs import TokenField

if TYPE_CHECKING:
    from server.model.experts import ExpertOp, ExpertSpec
    from server.model.mla import AbsorbedProjection
    from server.model.product import Product

# given the product y [T, sum of widths], changes it in place
Finish = Callable[[Tensor], None]


class SiteOp(Protocol):
    """What one kind of part does at one place of the model."""

    def begin(self, x: Tensor) -> Finish | None:
        """x [.., T, in], or [T, heads, in of a head]: what the product reads. It may run beside the product.

        None: no adapter of the step that is being computed acts here.
        """

    def defers(self, x: Tensor) -> bool:
        """Whether what adapters do here can be left to the reader of the product, in this step."""

    def deferred(self, x: Tensor) -> Delta:
        """What is left to it, where `defers` says so. It is launched beside the product."""


class SiteOps(Protocol):
    """Makes the ops of one kind of part, and tells its table where they act (server/assembly.py lists them)."""

    token_fields: Sequence[TokenField]  # what the ops want to know of each token, beside its adapter slot

    def at_linears(self, names: Sequence[str], product: "Product", is_lm_head: bool) -> SiteOp:
        """Beside the product of the linears of these names. is_lm_head: its rows are those that are sampled."""

    def at_absorbed(self, name: str, projection: "AbsorbedProjection") -> tuple[SiteOp, SiteOp, SiteOp]:
        """Before queries enter the latent space through the linear `name` (there x is also what is changed), where they
        do, and where results leave it."""

    def at_experts(self, spec: "ExpertSpec", dtype: torch.dtype) -> "ExpertOp":
        """In the routed experts of a layer, whose matrices are of this type."""


def begin_all(ops: Sequence[SiteOp], x: Tensor) -> list[Finish]:
    return [finish for op in ops if (finish := op.begin(x)) is not None]
