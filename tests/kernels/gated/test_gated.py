"""gated: the kernel against the reference, for every activation."""

import pytest
import torch

from kernels.gated import Act, Activation
from kernels.gated import kernel as gated_kernel
from kernels.gated.reference import gated
from tests.support.kernel_device import DEVICE

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("act", Act)
@pytest.mark.parametrize("interleaved", [False, True])
def test_kernel(act: Act, interleaved: bool) -> None:
    activation = Activation(act, 1.702, 0.7)
    wide = torch.randn(3, 2 * 40 + 8, device=DEVICE)
    products = wide[:, :80]
    torch.testing.assert_close(gated_kernel.gated(products, activation, interleaved),
                               gated(products, activation, interleaved), atol=2e-6, rtol=0)  # fmt: skip


def test_shapes() -> None:
    products = torch.randn(1, 3, 2 * 1040, dtype=torch.bfloat16, device=DEVICE)  # more columns than a program takes
    got = gated_kernel.gated(products, Activation())
    assert got.shape == (1, 3, 1040)
    torch.testing.assert_close(got, gated(products, Activation()), atol=2**-5, rtol=2**-6)
    assert gated_kernel.gated(products[:, :0], Activation()).shape == (1, 0, 1040)
    torch.library.opcheck(gated_kernel._gated.registered, (products, 0, 1.0, 0.0, False),
                          test_utils=("test_schema", "test_faketensor"))  # fmt: skip
