"""rope's host kernel against float64; what lies between heads is NaN."""

import math

import pytest
import torch
from torch import Tensor

from kernels.rope import rope, rope_complex

pytestmark = pytest.mark.usefixtures("poisoned_memory", "host_kernels")

ATOL = 5e-6  # float32, values of order 1 and up to about 6
TYPES = [torch.float32, torch.bfloat16]


def heads_of(tokens: int, heads: int, width: int, dtype: torch.dtype) -> Tensor:
    """[1, heads, T, width]: a transposed view of part of a projection."""
    projection = torch.full((1, tokens, heads, width + 5), math.nan, dtype=dtype)
    projection[..., 5:] = torch.randn(1, tokens, heads, width).to(dtype)
    return projection[..., 5:].transpose(1, 2)


def turned(x: Tensor, cosines: Tensor, sines: Tensor, pairs: str) -> Tensor:
    """cosines and sines [T, D / 2]."""
    wide, cosines, sines = x.double(), cosines.double(), sines.double()
    a, b = wide.chunk(2, -1) if pairs == "halves" else (wide[..., ::2], wide[..., 1::2])
    first, second = a * cosines - b * sines, b * cosines + a * sines
    return torch.stack([first, second], -1).flatten(-2) if pairs == "adjacent" else torch.cat([first, second], -1)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("pairs", ["halves", "interleaved", "adjacent"])
@pytest.mark.parametrize(
    ("tokens", "query_heads", "key_heads", "width"),
    [(1, 1, 1, 2), (3, 9, 2, 24), (2, 3, 19, 6), (5, 16, 1, 64), (0, 2, 1, 8), (40, 32, 8, 128), (4, 2, 2, 80)],
)
def test_rope(tokens: int, query_heads: int, key_heads: int, width: int, pairs: str, dtype: torch.dtype) -> None:
    query, key = heads_of(tokens, query_heads, width, dtype), heads_of(tokens, key_heads, width, dtype)
    angles = torch.randn(tokens, width // 2) * 10
    cosines, sines = angles.cos() * 1.2, angles.sin() * 1.2
    forms: list[tuple[Tensor, Tensor]] = []
    if pairs == "adjacent":
        forms.append(rope_complex(query, key, torch.stack([cosines, sines], -1)[None]))
    else:
        cosines, sines = cosines.to(dtype), sines.to(dtype)
        for half in (cosines, sines), (torch.cat([cosines] * 2, -1), torch.cat([sines] * 2, -1)):
            forms.append(rope(query, key, half[0][None], half[1][None], pairs == "interleaved"))
    wanted = [turned(x, cosines, sines, pairs) for x in (query, key)]
    for form in forms:
        for got, want in zip(form, wanted, strict=True):
            assert got.dtype == dtype and got.transpose(1, 2).is_contiguous() and got.shape == want.shape
            rtol = 2**-8 if dtype == torch.bfloat16 else 0  # rounded once
            torch.testing.assert_close(got.double(), want, atol=ATOL, rtol=rtol)


@pytest.mark.parametrize("pairs", ["halves", "adjacent"])
def test_bits_do_not_depend_on_threads_and_nan_stays_in_its_pair(pairs: str) -> None:
    query, key, angles = torch.randn(1, 64, 300, 64), torch.randn(1, 2, 300, 64), torch.randn(1, 300, 32)
    query[0, 3, 4, 5] = math.nan

    def call() -> tuple[Tensor, Tensor]:
        if pairs == "halves":
            return rope(query, key, angles.cos(), angles.sin())
        return rope_complex(query, key, torch.stack([angles.cos(), angles.sin()], -1))

    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(call())
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one.nan_to_num(9), two.nan_to_num(9))
    assert found[0][0].isnan().nonzero()[:, 3].tolist() == ([5, 37] if pairs == "halves" else [4, 5])
