"""The sampling kernel against its reference, and the reference against what it says of itself."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.sampling import Edits, Parameters, Sampled, kernel, reference
from kernels.sampling.draw import kernel as draw_kernel
from tests.support.breadth import always
from tests.support.edits import edits_of
from tests.support.kernel_device import DEVICE

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("poisoned_memory")]

Arguments = tuple[Tensor, Parameters]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows span several parts, and a search of a whole row several blocks."""
    monkeypatch.setattr(kernel, "PART", 128)
    monkeypatch.setattr(kernel, "_GATHERED", 64)
    monkeypatch.setattr(kernel, "_SEARCHED", 128)


def rows(
    logits: Tensor,
    temperature: float | list[float] = 1.0,
    top_k: int | list[int] = 0,
    top_p: float | list[float] = 1.0,
    min_p: float | list[float] = 0.0,
    draws: float | list[float] | None = None,
) -> Arguments:
    """Arguments of `sample`, a number standing for every row; draws at random by default."""
    count = len(logits)

    def each(value: Any, dtype: torch.dtype) -> Tensor:
        return torch.tensor(value if isinstance(value, list) else [value] * count, dtype=dtype, device=DEVICE)

    drawn = torch.rand(count).to(DEVICE) if draws is None else each(draws, torch.float32)
    floats = [each(value, torch.float32) for value in (temperature, top_p, min_p)]
    return logits.to(DEVICE), Parameters(floats[0], each(top_k, torch.int32), floats[1], floats[2], drawn)


def same_tokens(arguments: Arguments, edits: Edits | None = None) -> list[int]:
    """The kernel's, which are the reference's."""
    before = arguments[0].clone()
    got, expected = kernel.sample(*arguments, edits), reference.sample(*arguments, edits)
    assert got.tokens.tolist() == expected.tokens.tolist() and got.finite.tolist() == expected.finite.tolist()
    assert got.tokens.dtype == torch.int64 and got.finite.dtype == torch.bool
    assert arguments[0].view(torch.uint8).equal(before.view(torch.uint8))  # what the model says belongs to it
    return expected.tokens.tolist()


def kept(logits: Tensor, **cuts: Any) -> set[int]:
    """The tokens of one row [1, V] that are drawn as the draw goes from 0 to 1."""
    points = 199
    draws = [point / (points - 1) for point in range(points)]
    found = reference.sample(*rows(logits.expand(points, -1).contiguous(), **cuts, draws=draws)).tokens.tolist()
    # where each token's share has its middle, the kernel draws it too
    middles = [sum(draws[i] for i in range(points) if found[i] == it) / found.count(it) for it in sorted(set(found))]
    arguments = rows(logits.expand(len(middles), -1).contiguous(), **cuts, draws=middles)
    assert same_tokens(arguments) == sorted(set(found))
    return set(found)


# -- the cuts ---


@pytest.mark.parametrize(
    ("vocab", "dtype"),
    [(600, torch.bfloat16), (37, torch.float32), pytest.param(600, torch.float32, marks=pytest.mark.thorough)],
    ids=str,
)
def test_every_mix_of_parameters_draws_the_same_token(vocab: int, dtype: torch.dtype) -> None:
    temperature = [0.0, 1.0, 0.7, 1.0, 1.0, 1.0, 1.3, 0.6, 1.0, 5.0]
    top_k = [0, 0, 0, 5, 0, 0, 20, 20, vocab + 3, 1]
    top_p = [0.5, 1.0, 1.0, 1.0, 0.8, 1.0, 0.93, 0.93, 1.0, 0.99]
    min_p = [0.5, 0.0, 0.0, 0.0, 0.0, 0.1, 0.0, 0.02, 0.0, 0.0]
    logits = (3 * torch.randn(10, vocab)).to(dtype)
    tokens = same_tokens(rows(logits, temperature, top_k, top_p, min_p))
    assert tokens[0] == logits[0].float().argmax() and tokens[9] == logits[9].float().argmax()


CUTS: list[tuple[dict[str, Any], set[int]]] = [
    ({"top_k": 2}, {3, 1}),
    ({"top_p": 0.41}, {3, 1}),
    ({"min_p": 0.62}, {3, 1, 4}),
    ({"top_k": 3, "top_p": 0.74}, {3, 1, 4}),
    ({"min_p": 0.62, "top_p": 0.72}, {3, 1}),
    ({"top_k": 4}, {3, 1, 4, 0}),
    ({"top_k": 9}, {0, 1, 2, 3, 4}),
    ({"top_p": 0.37}, {3}),
    ({"top_p": 0.94}, {3, 1, 4, 0}),  # 0.88 is not enough
    ({"top_p": 1e-30}, {3}),
    ({"min_p": 0.66}, {3, 1}),  # 0.24 / 0.38 is 0.63
    ({"min_p": 1.0}, {3}),
    ({"top_k": 3, "top_p": 0.72}, {3, 1}),  # of 0.88: 0.38 is 0.43 and 0.64 is 0.727
    ({"top_k": 2, "min_p": 0.9, "top_p": 0.99}, {3}),
]


@pytest.mark.parametrize(("arguments", "expected"), always(CUTS, *CUTS[:5]), ids=str)
def test_the_cuts_keep_what_they_say(arguments: dict[str, Any], expected: set[int]) -> None:
    probabilities = torch.tensor([0.06, 0.26, 0.06, 0.38, 0.24])
    assert kept(probabilities.log()[None], **arguments) == expected


def test_ties_at_the_cut_go_to_the_lowest_ids() -> None:
    logits = torch.full((1, 300), -20.0)
    logits[0, [280, 5, 130, 131, 7]] = 2.0  # in three parts
    logits[0, 200] = 3.0
    assert kept(logits, top_k=4) == {200, 5, 7, 130}
    assert kept(logits, top_k=6) == {200, 5, 7, 130, 131, 280}
    # exp(3) of 20.1 + 5 * 7.4 = 57: two ties and part of a third make 0.65
    assert kept(logits, top_p=0.65) == {200, 5, 7, 130}
    # top-k leaves three of the ties; of 42.3, the first and two of them are 0.83
    assert kept(logits, top_k=4, top_p=0.8) == {200, 5, 7}
    assert kept(logits, top_k=4, top_p=0.9) == {200, 5, 7, 130}


def test_identical_logits() -> None:
    for value in (0.0, -7.5, 1e30):
        logits = torch.full((4, 199), value)
        logits[:, ::2] *= -1.0 if value == 0 else 1.0  # -0.0 ties with 0.0
        tokens = same_tokens(rows(logits, [0.0, 1.0, 1.0, 1.0], [0, 3, 150, 0], [1.0, 1.0, 1.0, 0.503], draws=0.999))
        assert tokens == [0, 2, 149, 100]  # of 199 * 0.503 = 100.1 the 101st, whose id is 100


def test_greedy_takes_the_lowest_of_equals_across_blocks() -> None:
    logits = torch.zeros(2, 300)
    logits[0, [290, 131, 150]] = 1.0
    assert same_tokens(rows(logits, temperature=[0.0, 9e-6])) == [131, 0]


@pytest.mark.parametrize("few", always([1, 2, 4, 16], 2, 16))
def test_looking_among_few_tokens_first_changes_nothing(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(400, 50).mul(2).round()  # many ties
    cuts = [
        (0, 0.6, 0.0),
        (3, 1.0, 0.0),
        (0, 1.0, 0.1),
        (16, 0.9, 0.0),
        (4, 0.99, 0.05),
        (0, 0.999, 0.0),
        (2, 0.1, 0.5),
    ]
    for chosen in (cuts, cuts[1:2], cuts[:1]):
        top_k, top_p, min_p = (list(it) for it in zip(*(chosen[i % len(chosen)] for i in range(400)), strict=True))
        arguments = rows(logits, 0.8, top_k, top_p, min_p)
        expected = reference.sample(*arguments).tokens
        with monkeypatch.context() as patch:
            patch.setattr(reference, "_FEW", few)
            assert reference.sample(*arguments).tokens.equal(expected)


def test_greedy_alone() -> None:
    logits = torch.randn(3, 199)
    logits[1, 7] = math.nan
    for sample in (kernel, reference):
        got = sample.greedy(logits.to(DEVICE))
        assert got.tokens.tolist() == [logits[0].argmax(), 0, logits[2].argmax()]
        assert got.finite.tolist() == [True, False, True]


# -- draws ---


def test_draws_of_nought_and_of_one() -> None:
    logits = torch.randn(6, 199)
    logits[:, :3] = -math.inf
    logits[:, -3:] = -math.inf
    cuts = {
        "top_k": [0, 7, 0, 0, 7, 0],
        "top_p": [1.0, 1.0, 0.7, 1.0, 0.7, 0.7],
        "min_p": [0.0, 0.0, 0.0, 0.3, 0.0, 0.3],
    }
    tokens = {draw: same_tokens(rows(logits, **cuts, draws=draw)) for draw in (0.0, 1.0)}
    assert tokens[0.0][0] == 3 and tokens[1.0][0] == 195
    ranks = logits.argsort(-1, descending=True)
    assert tokens[0.0][1] == ranks[1, :7].min() and tokens[1.0][1] == ranks[1, :7].max()


def test_a_token_without_probability_is_never_drawn() -> None:
    """Least of all behind the end, where rounding may put the draw."""
    logits = torch.full((1, 300), -200.0)
    logits[0, [3, 140]] = 0.0
    assert kept(logits) == {3, 140}
    assert same_tokens(rows(logits.expand(3, -1).contiguous(), draws=[0.49, 0.51, 1.0])) == [3, 140, 140]


@pytest.mark.parametrize("parameters", [{}, {"top_k": 6}, {"top_p": 0.8}, {"min_p": 0.2, "temperature": 1.4}], ids=str)
def test_frequencies_follow_the_distribution(parameters: dict[str, Any]) -> None:
    """Chi-square of evenly spread draws over the kept tokens: an inversion leaves next to nothing."""
    logits = torch.randn(1, 23)
    count = 2000
    draws = [(index + 0.5) / count for index in range(count)]
    arguments = rows(logits.expand(count, -1).contiguous(), **parameters, draws=draws)
    tokens = reference.sample(*arguments).tokens.cpu()
    weights = (logits[0] / parameters.get("temperature", 1.0)).softmax(-1)
    order = weights.argsort(descending=True)
    ends = weights[order].cumsum(0)
    keep = torch.ones(23, dtype=torch.bool)
    if "top_k" in parameters:
        keep[order[6:]] = False
    if "top_p" in parameters:
        keep[order[1:][ends[:-1] >= 0.8]] = False
    if "min_p" in parameters:
        keep &= weights >= 0.2 * weights.max()
    expected = count * weights * keep / (weights * keep).sum()
    got = torch.bincount(tokens, minlength=23)
    assert not got[~keep].any()
    assert ((got - expected)[keep] ** 2 / expected[keep]).sum() < 1.0
    some = slice(None, None, 400)
    taken = Parameters(*(it[some].contiguous() for it in arguments[1]))
    assert kernel.sample(arguments[0][some].contiguous(), taken).tokens.tolist() == tokens[some].tolist()


# -- extremes ---


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy's: -inf is what is wanted
def test_huge_and_tiny_temperatures_and_logits() -> None:
    logits = torch.randn(5, 199)
    logits[3, :3] = torch.tensor([-3e38, 3e38, 0.0])
    logits[4] *= 1e30
    temperature = [1e-5, 1e-4, 1e30, 1e-5, 1.0]
    tokens = same_tokens(rows(logits, temperature, draws=[0.99, 0.99, 0.5005, 0.99, 0.99]))
    best = logits.argmax(-1).tolist()
    assert tokens == [best[0], best[1], 99, 1, best[4]]  # 0.5005 of 199 equal ones: 99.6
    same_tokens(rows(logits, temperature, top_k=4, top_p=0.5))


def test_rows_that_are_not_finite_give_token_0_and_leave_others_alone() -> None:
    logits = torch.randn(6, 199)
    logits[1, 150] = math.nan
    logits[2, 150] = math.inf
    logits[3, 1:] = -math.inf
    logits[4] = -math.inf
    logits[5, 0] = -math.nan
    for temperature in (0.0, 1.0):
        arguments = rows(logits, temperature, top_p=0.9)
        assert same_tokens(arguments)[1:] == [0] * 5
        assert kernel.sample(*arguments).finite.tolist() == [True, False, False, True, False, False]


def test_no_rows() -> None:
    got = kernel.sample(*rows(torch.empty(0, 37)))
    assert got.tokens.shape == (0,) and got.finite.shape == (0,)


def test_rows_of_a_wider_tensor() -> None:
    logits = torch.full((3, 256), math.nan, device=DEVICE)
    _, parameters = rows(logits)
    logits[:, :199] = torch.randn(3, 199)
    got = kernel.sample(logits[:, :199], parameters)
    assert got.finite.all()
    assert got.tokens.equal(reference.sample(logits[:, :199].contiguous(), parameters).tokens)


def test_tokens_are_written_where_they_are_wanted() -> None:
    arguments = rows(torch.randn(2, 37))
    for module in (kernel, reference):
        for sample in (lambda out, it=module: it.sample(*arguments, out=out),
                       lambda out, it=module: it.greedy(arguments[0], out)):  # fmt: skip
            out = Sampled(torch.full((2,), -5, device=DEVICE), torch.zeros(2, dtype=torch.bool, device=DEVICE))
            got = sample(out)
            assert got.tokens.data_ptr() == out.tokens.data_ptr() and out.finite.all()
            assert (out.tokens >= 0).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's
def test_padding_may_hold_anything() -> None:
    odd = [math.nan, math.inf, -math.inf, -1.0]
    logits = torch.randn(5, 199)
    arguments = rows(logits, [1.0, *odd], [0, -5, 2**31 - 1, -(2**31), 3], [0.9, *odd[::-1]], [0.0, *odd], [0.4, *odd])
    got = kernel.sample(*arguments).tokens
    assert ((got >= 0) & (got < 199)).all()
    assert got[0] == reference.sample(*(arguments[0][:1], Parameters(*(it[:1] for it in arguments[1])))).tokens[0]


# -- where bins cannot tell ---


def hard_rows() -> dict[str, tuple[Tensor, dict[str, Any]]]:
    """Of 600 tokens, of which the second pass takes at most 128."""
    rising = torch.linspace(0, 1e-3, 600)
    one_bin = torch.where(torch.arange(600) % 3 == 0, 1.0, 1.06)
    deep = torch.full((600,), -40.0)
    deep[[7, 450]] = 0.0
    misled = torch.randn(600).mul(8).ceil().div(8).sub(1e-4)  # all at the upper end of their bins
    few = torch.full((600,), -math.inf)
    few[[130, 599]] = torch.tensor([1.0, 2.0])
    return {
        "equal": (torch.full((600,), 3.0), dict(top_k=[7, 500], top_p=[1.0, 0.7])),
        "nearly equal": (rising, dict(top_k=[0, 300], top_p=[0.5, 0.25])),
        "ties in a bin": (one_bin, dict(top_k=[450, 0], top_p=[1.0, 0.9])),
        "far below": (deep, dict(top_k=[3, 200], top_p=[1.0, 0.9])),
        "at the ends of bins": (misled, dict(top_k=[0, 0], top_p=[0.95, 0.3])),
        "almost nothing": (few, dict(top_k=[3, 0], top_p=[0.9, 0.5])),
        "hot": (torch.randn(600), dict(temperature=1e30, top_k=[0, 333], top_p=[0.4, 0.999])),
        "cold": (torch.randn(600), dict(temperature=1e-4, top_k=[100, 0], top_p=[1e-30, 0.999999])),
        "hardly anything wanted": (torch.randn(600), dict(top_k=[1, 0], top_p=[1.0, 0.0])),
    }


@pytest.mark.parametrize("name", hard_rows())
def test_rows_whose_cut_is_hard_to_find(name: str) -> None:
    logits, cuts = hard_rows()[name]
    same_tokens(rows(logits.expand(2, -1).contiguous(), **cuts, draws=[0.31, 0.9997]))


@pytest.mark.skipif(DEVICE != "cpu", reason="it watches the interpreter")
def test_usual_rows_are_not_searched_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[int] = []
    whole = draw_kernel._kept_weights
    monkeypatch.setattr(draw_kernel, "_kept_weights", lambda *args: (searched.append(1), whole(*args))[1])
    for dtype in (torch.float32, torch.bfloat16):
        logits = (2.5 * torch.randn(4, 600)).to(dtype)
        same_tokens(rows(logits, [1.0, 0.7, 1.5, 1.0], [0, 0, 0, 50], [0.9, 0.95, 0.9, 0.9], draws=0.6))
    assert searched == []
    same_tokens(rows(torch.zeros(1, 300), top_k=200, draws=0.6))
    assert searched == [1]


@pytest.mark.parametrize("edited", [False, True])
def test_schema(edited: bool) -> None:
    logits, parameters = rows(torch.randn(2, 37))
    out = (torch.zeros(2, dtype=torch.int64, device=DEVICE), torch.zeros(2, dtype=torch.bool, device=DEVICE))
    edits = list(edits_of(37, [dict(allowed=[1, 2]), dict(bias={3: 1.0}, history=([1], [2]))])) if edited else []
    torch.library.opcheck(
        kernel._sample_op.registered, (logits, list(parameters), edits, *out),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
