"""Edits: the kernel against the reference, the reference by hand, and tokens that both choose behind them."""

import math

import pytest
import torch
from torch import Tensor

from kernels.sampling import Edits, Parameters, kernel, reference
from kernels.sampling.edits.reference import edited
from tests.support.edits import Wanted, edits_of
from tests.support.kernel_device import DEVICE

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("poisoned_memory")]

VOCAB = 300


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "PART", 128)
    monkeypatch.setattr(kernel, "_GATHERED", 64)
    monkeypatch.setattr(kernel, "_SEARCHED", 128)


def parameters(count: int, temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0) -> Parameters:
    floats = [torch.full((count,), it, device=DEVICE) for it in (temperature, top_p, 0.0, 0.37)]
    return Parameters(floats[0], torch.full((count,), top_k, dtype=torch.int32, device=DEVICE), *floats[1:])


def same_tokens(logits: Tensor, edits: Edits, asked: Parameters | None = None) -> list[int]:
    logits, asked = logits.to(DEVICE), asked or parameters(len(logits))
    before = logits.clone()
    got, expected = kernel.sample(logits, asked, edits), reference.sample(logits, asked, edits)
    assert got.tokens.tolist() == expected.tokens.tolist() and got.finite.tolist() == expected.finite.tolist()
    assert logits.view(torch.uint8).equal(before.view(torch.uint8))
    return expected.tokens.tolist()


def by_kernel(logits: Tensor, edits: Edits) -> Tensor:
    """[P, V]: what is chosen from, before bans."""
    copies, _ = kernel._copied(logits, edits, -(-logits.shape[1] // kernel.PART))
    return copies.view(torch.float32)


def test_penalties_by_hand() -> None:
    logits = torch.tensor([[1.0, -1.0, 2.0, -2.0, 0.5], [1.0, -1.0, 2.0, -2.0, 0.5]], device=DEVICE)
    edits = edits_of(5, [dict(history=([0, 1, 0], [2, 3, 2, 2]), penalties=(0.25, 0.5, 2.0)),
                         dict(history=([4], []), penalties=(9.0, 9.0, 1.0))])  # fmt: skip
    expected = torch.tensor([[0.5, -2.0, 1.0 - 1.5 - 0.25, -4.0 - 0.5 - 0.25, 0.5], [1.0, -1.0, 2.0, -2.0, 0.5]])
    torch.testing.assert_close(edited(logits.clone(), edits, torch.arange(2)).cpu(), expected)
    assert by_kernel(logits, edits).flip(0).cpu().equal(expected)
    assert same_tokens(logits, edits) == [0, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_histories_and_biases_of_any_length(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)

    def some(count: int) -> list[int]:
        return torch.randint(VOCAB, (count,), generator=generator).tolist()

    wanted: list[Wanted] = [
        dict(history=(some(70), some(4090)), penalties=(0.5, 0.02, 1.2)),
        dict(allowed=some(100)),
        dict(history=([], some(130)), penalties=(-0.25, -0.1, 1.0), bias=dict.fromkeys(range(0, VOCAB, 2), -0.5)),
        {},
        dict(history=(some(1), []), penalties=(0.0, 0.0, 0.8), bias={0: 1.0, 127: 2.0, 128: 3.0, 299: 4.0},
             allowed=range(100, 300), bans=[299, 128]),
    ]  # fmt: skip
    logits, edits = torch.randn(5, VOCAB, generator=generator).to(dtype).to(DEVICE), edits_of(VOCAB, wanted)
    placed = torch.tensor([4, 2, 0])
    expected = edited(logits[placed].float(), edits._replace(ban_starts=0 * edits.ban_starts, bans=edits.bans[:0]),
                      placed)  # fmt: skip
    torch.testing.assert_close(by_kernel(logits, edits), expected, atol=1e-4, rtol=0)
    same_tokens(logits, edits)
    same_tokens(logits, edits, parameters(5, 0.8, top_p=0.9))


@pytest.mark.parametrize("vocab", [31, 129, 290])
def test_only_what_the_mask_allows_is_chosen(vocab: int) -> None:
    logits = -torch.arange(float(vocab)).expand(4, -1) / 10
    last = vocab - 1
    edits = edits_of(vocab, [dict(allowed=[last]), dict(allowed=[5, last]), {}, dict(allowed=[3], bias={3: -90.0})])
    assert same_tokens(logits, edits) == [last, 5, 0, 3]
    assert same_tokens(logits, edits, parameters(4, 0.05, top_p=0.9, top_k=4)) == [last, 5, 0, 3]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_ban_that_leaves_nothing_is_lifted(temperature: float) -> None:
    logits = torch.full((5, VOCAB), -math.inf)
    logits[:, 200] = 1.0
    logits[:, 7] = 0.5
    edits = edits_of(VOCAB, [dict(bans=[200]), dict(bans=[200, 7]), dict(allowed=[7, 9], bans=[7]),
                             dict(allowed=[7, 200], bans=[7, 9]), dict(bias={9: 30.0}, bans=[7, 250])])  # fmt: skip
    asked = parameters(5, temperature, top_p=0.6)
    assert same_tokens(logits, edits, asked) == [7, 200, 7, 200, 200]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's: NaN is what is wanted
def test_what_is_not_finite_stays_so() -> None:
    logits = torch.zeros(6, VOCAB)
    logits[[0, 2, 4], 200] = math.nan
    logits[[1, 3, 5], 200] = math.inf
    banned, masked, penalised = (
        dict(bans=[200]),
        dict(allowed=[3]),
        dict(history=([200], []), penalties=(0.0, 0.0, 2.0)),
    )
    edits = edits_of(VOCAB, [banned, banned, masked, masked, penalised, penalised])  # type: ignore[list-item]
    assert not kernel.sample(logits.to(DEVICE), parameters(6), edits).finite.any()
    same_tokens(logits, edits)
