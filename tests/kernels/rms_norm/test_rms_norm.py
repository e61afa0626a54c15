"""rms_norm: the reference against Transformers' modules, bit for bit, and the kernel against the reference."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama

from kernels.rms_norm import kernel as norm_kernel
from kernels.rms_norm import reference as norm_reference
from tests.support.kernel_device import DEVICE
from tests.support.norm_views import views

pytestmark = pytest.mark.usefixtures("poisoned_memory")

ATOL = 2e-6  # float32, values of order 1, sums of up to a few hundred of them
BF16_ATOL = 2**-5  # an ulp of values below 8; the interpreter truncates where others round, in up to two roundings

NORMS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "llama": (modeling_llama.LlamaRMSNorm, {}),
    "deepseek_v3": (modeling_deepseek_v3.DeepseekV3RMSNorm, {}),
    "gpt_oss": (modeling_gpt_oss.GptOssRMSNorm, {"cast_first": False}),
    "gemma2": (Gemma2RMSNorm, {"cast_first": False, "offset": 1.0}),
}


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


@pytest.mark.parametrize("family", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_is_the_family_s(family: str, dtype: torch.dtype) -> None:
    make, options = NORMS[family]
    module = make(96, eps=1e-5).to(DEVICE, dtype)
    module.weight.data = randn(96, dtype=dtype)
    x = randn(2, 5, 96, dtype=dtype) * 3
    with torch.no_grad():
        expected = module(x)
    got = norm_reference.rms_norm(x, module.weight.data, 1e-5, **options)
    assert got.dtype == dtype and got.equal(expected)
    fast = norm_kernel.rms_norm(x, module.weight.data, 1e-5, **options)
    assert fast.dtype == dtype
    atol = ATOL if dtype == torch.float32 else BF16_ATOL
    torch.testing.assert_close(fast, expected, atol=atol, rtol=2**-6 if dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize("width", [1, 7, 64, 129, 1500])
@pytest.mark.parametrize("count", [0, 1, 9, 33])
def test_rms_norm_of_odd_shapes(width: int, count: int) -> None:
    x, weight = randn(count, width), randn(width)
    got = norm_kernel.rms_norm(x, weight, 1e-6, 1.0, False)
    assert got.shape == (count, width)
    torch.testing.assert_close(got, norm_reference.rms_norm(x, weight, 1e-6, 1.0, False), atol=ATOL, rtol=ATOL)


@pytest.mark.parametrize("name", views(1))
@pytest.mark.parametrize("tokens", [1, 11])
def test_norms_of_views(name: str, tokens: int) -> None:
    x, weight = views(tokens)[name], randn(32)
    got = norm_kernel.rms_norm(x, weight, 1e-6)
    assert got.is_contiguous()
    torch.testing.assert_close(got, norm_reference.rms_norm(x, weight, 1e-6), atol=ATOL, rtol=ATOL)
    for other in (randn(*x.shape), views(tokens)[name]):
        before = x.clone()
        normed, total = norm_kernel.add_rms_norm(x, other, weight, 1e-6)
        expected_normed, expected_total = norm_reference.add_rms_norm(x, other, weight, 1e-6)
        assert total.equal(expected_total) and total.is_contiguous() and x.equal(before)
        torch.testing.assert_close(normed, expected_normed, atol=ATOL, rtol=ATOL)


def test_the_sum_is_rounded_before_it_is_normed() -> None:
    """As a model that adds in bfloat16 and then norms; a norm of the float32 sum would differ by more."""
    x, residual = randn(3, 64, dtype=torch.bfloat16) * 1e-3, randn(3, 64, dtype=torch.bfloat16)
    x[:, 0], residual[:, 0] = 1.0, 256.0  # 257 is not a bfloat16
    weight = torch.ones(64, device=DEVICE, dtype=torch.bfloat16)
    normed, total = norm_reference.add_rms_norm(x, residual, weight, 1e-6)
    assert total.equal(x + residual) and (total[:, 0] == 256).all()
    assert normed.equal(norm_reference.rms_norm(total, weight, 1e-6))
    got, got_total = norm_kernel.add_rms_norm(x, residual, weight, 1e-6)
    torch.testing.assert_close(got_total, total, atol=0, rtol=2**-7)
    torch.testing.assert_close(got, norm_reference.rms_norm(got_total, weight, 1e-6), atol=0, rtol=2**-6)


def test_norms_of_zeros_and_of_the_widest_row() -> None:
    weight = randn(32)
    assert not norm_kernel.rms_norm(torch.zeros(3, 32, device=DEVICE), weight, 1e-6).any()
    x, weight = randn(2, 16384), randn(16384)
    torch.testing.assert_close(
        norm_kernel.rms_norm(x, weight, 1e-6), norm_reference.rms_norm(x, weight, 1e-6), atol=1e-5, rtol=0
    )
    with pytest.raises(AssertionError):
        norm_kernel.rms_norm(randn(1, 16385), randn(16385), 1e-6)


def test_schemas() -> None:
    for op, arguments in (
        (norm_kernel.rms_norm, (randn(3, 32), randn(32), 1e-6)),
        (norm_kernel._add_rms_norm, (randn(3, 32), randn(3, 32), randn(32), 1e-6, 1.0, False)),
    ):
        torch.library.opcheck(op.registered, arguments, test_utils=("test_schema", "test_faketensor"))
