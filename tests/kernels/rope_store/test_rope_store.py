"""rope_store: the kernel against the ops that it is made of."""

import math

import pytest
import torch
from torch import Tensor

from kernels.rope_store import HeadNorms, Heads, reference
from kernels.rope_store import kernel as rope_store_kernel
from tests.support.kernel_device import DEVICE

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BLOCK = 4
SLOTS = [9, -1, 18, 19, 2]  # of five tokens, one of which only pads the batch


class Case:
    def __init__(self, heads: Heads, has_norms: bool = False, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.heads = heads
        widths = sum(heads.widths)
        self.qkv = torch.full((len(SLOTS), widths + 3), math.nan, device=DEVICE, dtype=dtype)[:, :widths]
        self.qkv.copy_(torch.randn(len(SLOTS), widths))
        angles = torch.randn(1, len(SLOTS), heads.rotated // 2, device=DEVICE)
        angles = torch.cat([angles, angles], -1)
        self.turns = angles.cos().to(dtype), angles.sin().to(dtype)
        weights = (1 + torch.randn(2, heads.dim) / 8).to(DEVICE, dtype)
        self.norms = HeadNorms(weights[0], weights[1], 1e-5, 1.0, False) if has_norms else None
        self.slots = torch.tensor(SLOTS, dtype=torch.int32, device=DEVICE)

    def caches(self) -> tuple[Tensor, Tensor]:
        """A key's heads are further apart than they are wide."""
        it = self.heads
        made = [torch.zeros(5, BLOCK, it.kv, width + 2, device=DEVICE, dtype=self.qkv.dtype)[..., :width]
                for width in (it.dim, it.value_dim)]  # fmt: skip
        return made[0], made[1]


@pytest.mark.parametrize(
    ("heads", "has_norms"),
    [
        (Heads(3, 1, 8, 8, 8), False),
        (Heads(10, 2, 12, 8, 12), True),  # more heads than a program takes, no power of two, narrower values
        (Heads(2, 2, 16, 16, 4), True),  # a part of each head
    ],
)
def test_kernel(heads: Heads, has_norms: bool) -> None:
    case = Case(heads, has_norms)
    theirs, ours = case.caches(), case.caches()
    expected = reference.rope_store(case.qkv, heads, *case.turns, *theirs, case.slots, case.norms)
    got = rope_store_kernel.rope_store(case.qkv, heads, *case.turns, *ours, case.slots, case.norms)
    assert got.is_contiguous()
    for one, other in ((got, expected), *zip(ours, theirs, strict=True)):
        torch.testing.assert_close(one, other, atol=4e-6, rtol=0)


def test_schema() -> None:
    case = Case(Heads(2, 1, 16, 16, 16), True)
    assert case.norms is not None
    arguments = (case.qkv, list(case.heads), *case.turns, *(it.contiguous() for it in case.caches()), case.slots,
                 *case.norms)  # fmt: skip
    torch.library.opcheck(rope_store_kernel._rope_store.registered, arguments,
                          test_utils=("test_schema", "test_faketensor"))  # fmt: skip
