"""rms_norm's host kernel against float64 and its reference; what lies between rows is NaN."""

import math

import pytest
import torch
from torch import Tensor

from kernels import host as host_kernels
from kernels.rms_norm import add_rms_norm, rms_norm
from tests.support.norm_views import views

pytestmark = pytest.mark.usefixtures("poisoned_memory", "host_kernels")

ATOL = 2e-6  # float32, values of order 1, sums of up to a few hundred of them
TYPES = [torch.float32, torch.bfloat16]


def exactly(x: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool) -> Tensor:
    wide = x.double()
    normed = wide * (wide.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    if cast_first:
        normed = normed.to(x.dtype).double()
    return normed * (offset + weight.double())


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("offset", "cast_first"), [(0.0, True), (0.0, False), (1.0, False), (1.0, True)])
@pytest.mark.parametrize("width", [1, 7, 15, 16, 17, 64, 129, 576, 1500, 16385])
@pytest.mark.parametrize("count", [0, 1, 9])
def test_shapes(count: int, width: int, offset: float, cast_first: bool, dtype: torch.dtype) -> None:
    whole = torch.full((count, width + 3), math.nan, dtype=dtype)
    x, weight = whole[:, :width].copy_(torch.randn(count, width) * 3), torch.randn(width).to(dtype)
    got = rms_norm(x, weight, 1e-6, offset, cast_first)
    assert got.dtype == dtype and got.is_contiguous()
    # in bfloat16 a unit where the norm is rounded first and lies between two, and half a unit at the end
    rtol = 2**-7 + 2**-8 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(got.double(), exactly(x, weight, 1e-6, offset, cast_first), atol=ATOL, rtol=rtol)
    residual = torch.randn(count, width).to(dtype)
    before = x.clone()
    normed, total = add_rms_norm(x, residual, weight, 1e-6, offset, cast_first)
    assert torch.equal(total, x + residual) and torch.equal(x, before)
    assert torch.equal(normed, rms_norm(total, weight, 1e-6, offset, cast_first))


@pytest.mark.parametrize("name", views(1))
@pytest.mark.parametrize("tokens", [1, 11])
def test_views(name: str, tokens: int) -> None:
    x, weight = views(tokens)[name].cpu(), torch.randn(32)
    got = rms_norm(x, weight, 1e-6)
    with host_kernels.references_only():
        wanted = rms_norm(x, weight, 1e-6)
    assert got.is_contiguous()
    torch.testing.assert_close(got, wanted, atol=ATOL, rtol=ATOL)
    other = views(tokens)[name].cpu()
    assert torch.equal(add_rms_norm(x, other, weight, 1e-6)[1], x + other)


def test_a_weight_of_another_type_is_the_reference_s() -> None:
    x, weight = torch.randn(3, 32).bfloat16(), torch.randn(32)
    got = rms_norm(x, weight, 1e-6, cast_first=False)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), exactly(x, weight, 1e-6, 0.0, False), atol=ATOL, rtol=2**-8)


def test_what_is_not_finite_shows_in_its_own_row_only() -> None:
    x, weight = torch.randn(5, 33), torch.rand(33) + 0.5
    clean = rms_norm(x, weight, 1e-6)
    for value in (math.nan, math.inf):
        x[2, 32] = value
        got = rms_norm(x, weight, 1e-6)
        others = torch.arange(5) != 2
        assert torch.equal(got[others], clean[others]) and bool(got[2, 32].isnan())
        if math.isnan(value):
            assert bool(got[2].isnan().all())


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    x, weight = torch.randn(1500, 700).to(dtype), torch.randn(700).to(dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(rms_norm(x, weight, 1e-6))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    assert torch.equal(rms_norm(x[7:8], weight, 1e-6)[0], found[0][7])
