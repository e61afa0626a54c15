"""rope: the reference against Transformers' functions, bit for bit, and the kernel against the reference."""

import math

import pytest
import torch
from torch import Tensor
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama

from kernels.rope import kernel as rope_kernel
from kernels.rope import reference as rope_reference
from tests.support.kernel_device import DEVICE

pytestmark = pytest.mark.usefixtures("poisoned_memory")

ATOL = 2e-6  # float32, values of order 1, sums of up to a few hundred of them
BF16_ATOL = 2**-5  # an ulp of values below 8; the interpreter truncates where others round, in up to two roundings


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def heads_of(tokens: int, heads: int, width: int, dtype: torch.dtype) -> Tensor:
    """[1, heads, T, width] as models have it: a transposed view of part of a projection, with NaN around it."""
    projection = torch.full((1, tokens, heads, width + 16), math.nan, device=DEVICE, dtype=dtype)
    projection[..., 16:] = randn(1, tokens, heads, width, dtype=dtype)
    return projection[..., 16:].transpose(1, 2)


def angles(tokens: int, width: int) -> Tensor:
    """[1, T, width / 2], of positions that do not start at 0."""
    positions = torch.arange(5, 5 + tokens, device=DEVICE)[:, None]
    return (positions / 100 ** (torch.arange(width // 2, device=DEVICE) / (width // 2)))[None]


Pair = tuple[Tensor, Tensor]


def rope_cases(name: str, query: Tensor, key: Tensor) -> tuple[Pair, Pair, Pair]:
    """(Transformers', the reference's, the kernel's) for one family's function."""
    angle = angles(query.shape[2], query.shape[3])
    scaled = 1.2  # as yarn scales both
    half = ((angle.cos() * scaled).to(query.dtype), (angle.sin() * scaled).to(query.dtype))
    full = (torch.cat([half[0]] * 2, -1), torch.cat([half[1]] * 2, -1))
    if name == "deepseek_v2":
        turns = torch.polar(torch.ones_like(angle), angle) * scaled
        real = torch.view_as_real(turns)
        expected = modeling_deepseek_v2.apply_rotary_emb(query, key, turns)
        return expected, rope_reference.rope_complex(query, key, real), rope_kernel.rope_complex(query, key, real)
    function, turns, interleaved = {
        "llama": (modeling_llama.apply_rotary_pos_emb, full, False),
        "gpt_oss": (modeling_gpt_oss.apply_rotary_pos_emb, half, False),
        "deepseek_v3": (modeling_deepseek_v3.apply_rotary_pos_emb_interleave, full, True),
    }[name]
    return (
        function(query, key, *turns),
        rope_reference.rope(query, key, *turns, interleaved),
        rope_kernel.rope(query, key, *turns, interleaved),
    )


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize(
    ("tokens", "query_heads", "key_heads", "width"), [(1, 1, 1, 2), (3, 9, 2, 24), (2, 3, 19, 8), (5, 16, 1, 64)]
)
def test_rope_is_the_family_s(name: str, tokens: int, query_heads: int, key_heads: int, width: int) -> None:
    query = heads_of(tokens, query_heads, width, torch.float32)
    key = heads_of(tokens, key_heads, width, torch.float32)
    for expected, reference, kernel in zip(*rope_cases(name, query, key), strict=True):
        assert reference.equal(expected)
        torch.testing.assert_close(kernel, expected, atol=ATOL, rtol=0)
        assert reference.transpose(1, 2).is_contiguous() and kernel.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "deepseek_v2", "deepseek_v3"])
def test_rope_in_bfloat16(name: str) -> None:
    query, key = heads_of(3, 4, 32, torch.bfloat16), heads_of(3, 2, 32, torch.bfloat16)
    for expected, reference, kernel in zip(*rope_cases(name, query, key), strict=True):
        assert expected.dtype == reference.dtype == kernel.dtype == torch.bfloat16
        assert reference.equal(expected)
        torch.testing.assert_close(kernel, expected, atol=BF16_ATOL, rtol=2**-6)


def test_rope_of_no_tokens_and_of_contiguous_heads() -> None:
    query, key = randn(1, 4, 0, 32), randn(1, 2, 0, 32)
    turns = randn(1, 0, 32), randn(1, 0, 32)
    assert [it.shape for it in rope_kernel.rope(query, key, *turns)] == [query.shape, key.shape]
    query, key = randn(1, 4, 3, 32), randn(1, 2, 3, 32)
    turns = randn(1, 3, 32), randn(1, 3, 32)
    turns = tuple(torch.cat([it[..., :16]] * 2, -1) for it in turns)
    for got, expected in zip(
        rope_kernel.rope(query, key, *turns), rope_reference.rope(query, key, *turns), strict=True
    ):
        torch.testing.assert_close(got, expected, atol=ATOL, rtol=0)


def test_schemas() -> None:
    query, key = heads_of(3, 4, 32, torch.float32), heads_of(3, 1, 32, torch.float32)
    turns, pairs = (randn(1, 3, 32), randn(1, 3, 32)), randn(1, 3, 16, 2)
    for op, arguments in (
        (rope_kernel.rope, (query, key, *turns, True)),
        (rope_kernel.rope_complex, (query, key, pairs)),
    ):
        torch.library.opcheck(op.registered, arguments, test_utils=("test_schema", "test_faketensor"))
