"""The kernel of logprobs against its reference, and the reference against a sort of the whole log_softmax."""

import math

import pytest
import torch
from torch import Tensor

from kernels.logprobs import LEAST, Logprobs, kernel, reference
from tests.support.kernel_device import DEVICE

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("poisoned_memory")]

ATOL = 1e-5  # float32 sums of a thousand terms, and logits of order 10


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows span several blocks, and the reference's blocks few rows."""
    monkeypatch.setattr(kernel, "PART", 128)
    monkeypatch.setattr(kernel, "_MERGED", 32)
    monkeypatch.setattr(reference, "_BLOCK", 700)


def sorted_out(logits: Tensor, tokens: Tensor, num: int) -> Logprobs:
    """By definition, in float64."""
    parts = logits.double().log_softmax(-1).clamp(min=LEAST)
    ids = logits.float().sort(dim=-1, descending=True, stable=True).indices[:, :num]
    own = logits.gather(-1, tokens[:, None])
    return Logprobs(parts.gather(-1, tokens[:, None])[:, 0].float(), (logits > own).sum(-1) + 1, ids,
                    parts.gather(-1, ids).float())  # fmt: skip


def same(got: Logprobs, expected: Logprobs) -> None:
    assert got.ids.tolist() == expected.ids.tolist() and got.rank.tolist() == expected.rank.tolist()
    assert [it.dtype for it in got] == [torch.float32, torch.int64, torch.int64, torch.float32]
    for ours, theirs in ((got.chosen, expected.chosen), (got.top, expected.top)):
        torch.testing.assert_close(ours.cpu(), theirs.cpu(), atol=ATOL, rtol=0, equal_nan=True)


def compare(logits: Tensor, tokens: Tensor, num: int) -> Logprobs:
    """Both forms with the definition; returns it."""
    logits, tokens = logits.to(DEVICE), tokens.to(DEVICE)
    expected = sorted_out(logits, tokens, num)
    same(reference.logprobs(logits, tokens, num), expected)
    same(kernel.logprobs(logits, tokens, num), expected)
    return expected


@pytest.mark.parametrize(("vocab", "num"), [(37, 20), (300, 20), (300, 0), (300, 1), (5, 5), (5, 20), (1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_against_the_definition(vocab: int, num: int, dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(9, vocab)).to(dtype)
    got = compare(logits, torch.randint(vocab, (9,)), num)
    assert got.ids.shape == got.top.shape == (9, min(num, vocab))


@pytest.mark.parametrize("num", [1, 5, pytest.param(20, marks=pytest.mark.thorough)])
def test_ties_go_to_the_lowest_ids(num: int) -> None:
    """Also where they lie on both sides of the cut, in some rows, and where everything is equal."""
    logits = torch.randn(40, 300).mul(2).round()
    logits[3] = 1.5
    logits[4, ::2] = 0.0
    logits[4, 1::2] = -0.0  # equal to 0.0
    compare(logits, torch.arange(40) * 7, num)


def test_rank_counts_what_is_strictly_larger() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]])
    for token, rank in ((1, 1), (4, 1), (3, 4), (0, 5)):
        assert compare(logits, torch.tensor([token]), 2).rank.tolist() == [rank]


def test_what_has_no_probability_has_a_number_all_the_same() -> None:
    logits = torch.full((3, 200), -math.inf)
    logits[:, 7] = 2.0
    logits[1, 150] = -3e38
    logits[2] = torch.linspace(-1e38, 1e38, 200)
    got = compare(logits, torch.tensor([5, 150, 0]), 4)
    assert got.chosen.tolist() == [LEAST] * 3 and got.rank.tolist() == [2, 2, 200]
    assert got.ids.tolist() == [[7, 0, 1, 2], [7, 150, 0, 1], [199, 198, 197, 196]]
    assert got.top[0].tolist() == [0.0, LEAST, LEAST, LEAST]


def test_rows_that_are_not_finite_leave_others_alone() -> None:
    """A NaN is the largest to topk: what is left of its row must not be mistaken for ties."""
    logits = torch.randn(7, 199)
    logits[1, 150] = math.nan
    logits[2, 150] = math.inf
    logits[3] = -math.inf
    logits[4, :2] = math.nan
    logits[4, 2:] = 1.0
    logits[5, :] = math.nan
    tokens = torch.arange(7)
    fine = [0, 6]
    expected = sorted_out(logits, tokens, 3)
    for logprobs in (kernel.logprobs, reference.logprobs):
        got = Logprobs(*(it.cpu() for it in logprobs(logits.to(DEVICE), tokens.to(DEVICE), 3)))
        same(Logprobs(*(it[fine] for it in got)), Logprobs(*(it[fine] for it in expected)))
        assert got.chosen[1:6].isnan().all() and got.top[1:6].isnan().all()
        assert (got.rank[1:6] == 1).all() and (got.ids[1:6] == 0).all()


def test_no_rows_and_rows_of_a_wider_tensor() -> None:
    for logprobs in (kernel.logprobs, reference.logprobs):
        got = logprobs(torch.empty(0, 37, device=DEVICE), torch.empty(0, dtype=torch.int64, device=DEVICE), 3)
        assert got.chosen.shape == got.rank.shape == (0,) and got.ids.shape == got.top.shape == (0, 3)
        wide = torch.full((3, 256), math.nan)
        wide[:, :199] = torch.randn(3, 199)
        tokens = torch.tensor([0, 198, 5])
        same(logprobs(wide.to(DEVICE)[:, :199], tokens.to(DEVICE), 3), sorted_out(wide[:, :199], tokens, 3))


def test_schema() -> None:
    arguments = (torch.randn(2, 37, device=DEVICE), torch.tensor([1, 36], device=DEVICE), 3)
    torch.library.opcheck(kernel._logprobs_op.registered, arguments, test_utils=("test_schema", "test_faketensor"))
