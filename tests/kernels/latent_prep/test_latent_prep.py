"""latent_prep's kernel against the composition that defines it."""

import math

import pytest
import torch
from torch import Tensor

from kernels.latent_prep import LatentNorm, Pairing, Turns, reference
from kernels.latent_prep.kernel import _launch as latent_prep_op
from kernels.latent_prep.kernel import latent_prep
from tests.support.kernel_device import DEVICE

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("poisoned_memory")]

HEADS, LATENT, ROTARY, KEY, BLOCKS, BLOCK_SIZE = 3, 24, 8, 5, 4, 4


def make(tokens: int, pairing: Pairing, dtype: torch.dtype = torch.float32) -> tuple[object, ...]:
    """Parts of wider projections, as they come; the second token only pads the batch."""
    wide = torch.randn(tokens, HEADS * (KEY + ROTARY) + LATENT + ROTARY, device=DEVICE, dtype=dtype)
    query, compressed = wide.split([HEADS * (KEY + ROTARY), LATENT + ROTARY], -1)
    angles = torch.randn(tokens, ROTARY // 2, device=DEVICE)
    norm = LatentNorm(torch.rand(LATENT, device=DEVICE, dtype=dtype) + 0.5, 1e-3)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    if pairing == Pairing.ADJACENT:
        cos, sin = torch.view_as_real(torch.polar(torch.ones_like(angles), angles)).unbind(-1)
    slots = torch.randperm(BLOCKS * BLOCK_SIZE)[:tokens].to(DEVICE, torch.int32)
    slots[1] = -1
    return query.unflatten(-1, (HEADS, -1))[..., KEY:], compressed, *norm, Turns(cos, sin, pairing), slots


def buffers(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    cache = torch.full((BLOCKS, BLOCK_SIZE, 1, LATENT + ROTARY), math.nan, device=DEVICE, dtype=dtype)
    return cache, torch.full((tokens, HEADS, LATENT + ROTARY), math.nan, device=DEVICE, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pairing", Pairing, ids=lambda it: it.name)
def test_the_kernel_computes_what_the_ops_do_one_by_one(pairing: Pairing, dtype: torch.dtype) -> None:
    """And writes nothing beside."""
    *inputs, slots = make(5, pairing, dtype)
    expected, got = buffers(5, dtype), buffers(5, dtype)
    reference.latent_prep(*inputs, expected[0], slots, expected[1])  # type: ignore[arg-type]
    latent_prep(*inputs, got[0], slots, got[1])  # type: ignore[arg-type]
    # the interpreter truncates where a chip rounds
    tolerance = 2e-6 if dtype == torch.float32 else 3e-2
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), atol=tolerance, rtol=tolerance, equal_nan=True)
    assert not got[0].isnan().all(-1).all() and got[1][..., :LATENT].isnan().all()


def test_latent_prep_op_is_registered_rightly() -> None:
    query, compressed, weight, eps, offset, cast_first, turns, slots = make(3, Pairing.HALVES)
    cache, absorbed = (it.zero_() for it in buffers(3, torch.float32))
    arguments = (query, compressed, weight, eps, offset, cast_first, turns.cos, turns.sin, int(turns.pairing), cache,
                 slots, absorbed)  # type: ignore[attr-defined]  # fmt: skip
    torch.library.opcheck(latent_prep_op.registered, arguments, test_utils=("test_schema", "test_faketensor"))
