"""The sampling kernel against its reference, and the reference against what it says of itself."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.sampling import Penalties, Sampled, kernel, reference
from tests.support.breadth import always
from tests.support.kernel_device import DEVICE

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("poisoned_memory")]

VOCABS = (37, 199, 1000)  # one block and part of one; several, the last one short


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows span several blocks."""
    monkeypatch.setattr(kernel, "BLOCK", 128)


def rows(
    logits: Tensor,
    temperature: float | list[float] = 1.0,
    top_k: int | list[int] = 0,
    top_p: float | list[float] = 1.0,
    min_p: float | list[float] = 0.0,
    draws: float | list[float] | None = None,
) -> tuple[Tensor, ...]:
    """Arguments of `sample`, a number standing for every row; draws at random by default."""
    count = len(logits)

    def each(value: Any, dtype: torch.dtype) -> Tensor:
        return torch.tensor(value if isinstance(value, list) else [value] * count, dtype=dtype, device=DEVICE)

    drawn = torch.rand(count) if draws is None else each(draws, torch.float32)
    floats = [each(value, torch.float32) for value in (temperature, top_p, min_p)]
    return logits.to(DEVICE), floats[0], each(top_k, torch.int32), floats[1], floats[2], drawn.to(DEVICE)


def both(arguments: tuple[Tensor, ...], penalties: Penalties | None = None) -> tuple[Sampled, Sampled]:
    return kernel.sample(*arguments, penalties), reference.sample(*arguments, penalties)


def same_tokens(arguments: tuple[Tensor, ...], penalties: Penalties | None = None) -> list[int]:
    got, expected = both(arguments, penalties)
    assert got.tokens.tolist() == expected.tokens.tolist() and got.finite.tolist() == expected.finite.tolist()
    assert got.tokens.dtype == torch.int64 and got.finite.dtype == torch.bool
    return expected.tokens.tolist()


def kept(arguments: tuple[Tensor, ...], sample: Any = kernel.sample, points: int = 13) -> list[set[int]]:
    """The tokens of each row that are drawn as the draw goes from 0 to 1."""
    tokens = [
        sample(*arguments[:5], torch.full_like(arguments[5], point / (points - 1))).tokens.tolist()
        for point in range(points)
    ]
    return [set(row) for row in zip(*tokens, strict=True)]


# -- the cuts ---


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
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
    made = rows(probabilities.log()[None], **arguments)
    assert kept(made, reference.sample, 199) == [expected]
    assert kept(made, kernel.sample, 21) == [expected]


def test_ties_at_the_cut_go_to_the_lowest_ids() -> None:
    logits = torch.full((1, 300), -20.0)
    logits[0, [280, 5, 130, 131, 7]] = 2.0  # in three blocks
    logits[0, 200] = 3.0
    assert kept(rows(logits, top_k=4)) == [{200, 5, 7, 130}]
    assert kept(rows(logits, top_k=6)) == [{200, 5, 7, 130, 131, 280}]
    # exp(3) of 20.1 + 5 * 7.4 = 57: two ties and part of a third make 0.65
    assert kept(rows(logits, top_p=0.65)) == [{200, 5, 7, 130}]
    # top-k leaves three of the ties; of 42.3, the first and two of them are 0.83
    assert kept(rows(logits, top_k=4, top_p=0.8)) == [{200, 5, 7}]
    assert kept(rows(logits, top_k=4, top_p=0.9)) == [{200, 5, 7, 130}]


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
    tokens = {draw: same_tokens(rows(logits, **cuts, draws=draw)) for draw in (0.0, 1 - 2**-24, 1.0)}
    assert tokens[0.0][0] == 3 and tokens[1.0][0] == 195
    ranks = logits.argsort(-1, descending=True)
    assert tokens[0.0][1] == ranks[1, :7].min() and tokens[1.0][1] == ranks[1, :7].max()


def test_a_token_without_probability_is_never_drawn() -> None:
    """Least of all behind the end, where rounding may put the draw."""
    logits = torch.full((1, 300), -200.0)
    logits[0, [3, 140]] = 0.0
    assert kept(rows(logits)) == [{3, 140}]
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
    some = slice(None, None, 100)
    taken = tuple(it[some].contiguous() for it in arguments)
    assert kernel.sample(*taken).tokens.tolist() == tokens[some].tolist()


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
        tokens = same_tokens(arguments)
        got, _ = both(arguments)
        assert got.finite.tolist() == [True, False, False, True, False, False]
        assert tokens[1:] == [0] * 5


def test_no_rows() -> None:
    got, expected = both(rows(torch.empty(0, 37)))
    assert got.tokens.shape == expected.tokens.shape == (0,) and got.finite.shape == (0,)


def test_rows_of_a_wider_tensor() -> None:
    logits = torch.full((3, 256), math.nan)
    logits[:, :199] = torch.randn(3, 199)
    arguments = rows(logits)
    got = kernel.sample(arguments[0][:, :199], *arguments[1:])
    assert (
        got.finite.all()
        and got.tokens.tolist() == reference.sample(arguments[0][:, :199], *arguments[1:]).tokens.tolist()
    )


# -- penalties ---


def penalties_of(histories: list[tuple[list[int], list[int]]], **values: list[float]) -> Penalties:
    starts, flat = [0], []
    for prompt, output in histories:
        flat += prompt + output
        starts.append(len(flat))
    ints = [flat, starts, [len(prompt) for prompt, _ in histories]]
    floats = [torch.tensor(values[name], device=DEVICE) for name in ("presence", "frequency", "repetition")]
    return Penalties(*floats, *(torch.tensor(it, dtype=torch.int32, device=DEVICE) for it in ints))


def kernel_penalized(logits: Tensor, penalties: Penalties) -> Tensor:
    """The logits that the kernel samples from."""
    penalised = logits.to(torch.float32, copy=True)
    blocks = -(-len(penalties.history) // kernel._HISTORY_BLOCK)
    kernel._penalize[(len(logits), blocks)](
        penalised, penalties.history, penalties.history_starts, penalties.prompt_lens, penalties.presence,
        penalties.frequency, penalties.repetition, logits.shape[1], BLOCK=kernel._HISTORY_BLOCK,
    )  # fmt: skip
    return penalised


def test_penalties_by_hand() -> None:
    logits = torch.tensor([[1.0, -1.0, 2.0, -2.0, 0.5], [1.0, -1.0, 2.0, -2.0, 0.5]])
    penalties = penalties_of(
        [([0, 1, 0], [2, 3, 2, 2]), ([4], [])], presence=[0.25, 9.0], frequency=[0.5, 9.0], repetition=[2.0, 1.0]
    )
    expected = torch.tensor([[0.5, -2.0, 1.0 - 1.5 - 0.25, -4.0 - 0.5 - 0.25, 0.5], [1.0, -1.0, 2.0, -2.0, 0.5]])
    before = logits.clone()
    arguments = rows(logits, temperature=0.0)
    torch.testing.assert_close(reference.penalized(arguments[0], penalties).cpu(), expected)
    assert same_tokens(arguments, penalties) == [0, 2] and arguments[0].cpu().equal(before)
    assert kernel_penalized(arguments[0], penalties).cpu().equal(reference.penalized(arguments[0], penalties).cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_penalties_over_histories_of_several_blocks(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    lengths = [(0, 0), (70, 90), (1, 0), (0, 130)]
    histories = [
        (torch.randint(37, (p,), generator=generator).tolist(), torch.randint(37, (o,), generator=generator).tolist())
        for p, o in lengths
    ]
    penalties = penalties_of(
        histories, presence=[0.5, 0.5, 0.0, -0.25], frequency=[0.1, 0.2, 0.0, -0.1], repetition=[1.3, 1.2, 0.8, 1.0]
    )
    arguments = rows(torch.randn(4, 37).to(dtype))
    same_tokens(arguments, penalties)
    logits = arguments[0]
    torch.testing.assert_close(
        kernel_penalized(logits, penalties), reference.penalized(logits, penalties), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("penalized", [False, True])
def test_schema(penalized: bool) -> None:
    penalties: Any = (None,) * 6
    if penalized:
        penalties = penalties_of([([1], [2]), ([], [3])], presence=[1.0] * 2, frequency=[0.0] * 2, repetition=[1.0] * 2)
    torch.library.opcheck(
        kernel._sample_op,
        (*rows(torch.randn(2, 37)), *penalties),
        test_utils=("test_schema", "test_faketensor"),
    )
