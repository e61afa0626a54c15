"""gated: the activation of a gated layer, between its two products.

    out = act(gate) * up          where a row of the first product holds both

Running example, with SiLU: a row [1, 2, 3, 4] holds the gates 1 and 2 and the ups 3 and 4. silu(1) is 0.731 and silu(2)
is 1.762, so it becomes [2.193, 7.046]. Interleaved, its gates are 1 and 3 and its ups 2 and 4.
"""

from torch import Tensor

from kernels.compiled import takes
from kernels.gated import host, reference
from kernels.gated.activation import Act, Activation, split_gate_up
from kernels.host import takes as host_takes
from kernels.lora.delta import Delta

__all__ = ["Act", "Activation", "gated", "split_gate_up"]


def gated(products: Tensor, activation: Activation, interleaved: bool = False, delta: Delta | None = None) -> Tensor:
    """See reference.py for shapes. delta: what adapters add to the products, and is not added yet; for Triton's kernel,
    and not where gates and ups alternate."""
    if takes(products):
        from kernels.gated import kernel

        return kernel.gated(products, activation, interleaved, delta)
    assert delta is None
    if host_takes(products):
        return host.gated(products, activation, interleaved, products.dtype)
    return reference.gated(products, activation, interleaved)
