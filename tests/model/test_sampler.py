"""From logits to tokens for a batch: what some requests do with their logits, and that it is theirs alone."""

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

import kernels.sampling.reference
from kernels.sampling import Edits
from kernels.sampling.edits.reference import edited
from server.engine.masks import Mask
from server.engine.request import LaneSpec, Logprobs, Request, Sampling, Token
from tests.support.sampled import sample

VOCAB = 50
_NO_MASKS: Mapping[int, Mask] = {}


def request(
    sampling: Sampling,
    prompt: tuple[int, ...] = (1,),
    output: tuple[int, ...] = (),
    stops: tuple[int, ...] = (),
    number: int = 0,
) -> Request:
    it = Request(number, [LaneSpec(list(prompt))], 99, sampling, frozenset(stops))
    for token in output:
        it.append(token)
    return it


def tokens(logits: Tensor, *requests: Request, masks: Mapping[int, Mask] = _NO_MASKS) -> list[int | None]:
    return [token and token.id for token in sample(logits, requests, masks).read()]


def mask_of(*allowed: int, vocab: int = VOCAB) -> Mask:
    """One in which these tokens may come, and nothing else."""
    return memoryview(sum(1 << token for token in allowed).to_bytes(-(-vocab // 32) * 4, "little"))


def greedy(**fields: object) -> Sampling:
    return Sampling(temperature=0.0, **fields)  # type: ignore[arg-type]


def descending(rows: int = 1, vocab: int = VOCAB) -> Tensor:
    """Token 0 is the best, and each next one a little worse."""
    return (-torch.arange(vocab) / 10).expand(rows, -1).clone()


# -- one row ---


def test_a_bias_is_added() -> None:
    assert tokens(descending(), request(greedy(bias={7: 0.5}))) == [0]
    assert tokens(descending(), request(greedy(bias={7: 0.75}))) == [7]
    assert tokens(descending(), request(greedy(bias={0: -0.15, 1: -100.0, 3: 0.1}))) == [0]
    assert tokens(descending(), request(greedy(bias={0: -0.25, 1: -100.0, 3: 0.15}))) == [3]


def test_stop_tokens_are_banned_until_there_are_tokens_enough() -> None:
    for generated, expected in ((0, 3), (1, 3), (2, 0)):
        output = (9,) * generated
        assert tokens(descending(), request(greedy(min_tokens=2), output=output, stops=(0, 1, 2))) == [expected]
    favoured = greedy(min_tokens=2, bias={0: 100.0, 5: 10.0})  # a ban outweighs a bias
    assert tokens(descending(), request(favoured, stops=(0,))) == [5]


@pytest.mark.parametrize("vocab", [1, 15, 16, 17, 31, 33, 50, 2048])
def test_only_what_the_mask_allows_is_chosen(vocab: int) -> None:
    for token in {0, vocab // 2, vocab - 1}:
        mask = mask_of(token, vocab=vocab)
        for sampling in (greedy(), Sampling(temperature=2.0, seed=token), greedy(bias={token: -100.0})):
            assert tokens(descending(vocab=vocab), request(sampling), masks={0: mask}) == [token]


def test_a_mask_is_of_its_own_row() -> None:
    drawn = Sampling(temperature=1.0, seed=3)
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0))
    asks = [request(it, number=number) for number, it in enumerate((greedy(), drawn, greedy(), drawn))]
    free = tokens(logits, *asks)
    bound = tokens(logits, *asks, masks={0: mask_of(7, 9), 3: mask_of(11)})
    assert bound[1:3] == free[1:3]
    assert bound[0] == (7 if logits[0, 7] > logits[0, 9] else 9)
    assert bound[3] == 11


def test_a_ban_of_stop_tokens_is_lifted_where_the_mask_allows_nothing_else() -> None:
    wants_more = greedy(min_tokens=5)
    assert tokens(descending(), request(wants_more, stops=(4,)), masks={0: mask_of(4, 9)}) == [9]
    assert tokens(descending(), request(wants_more, stops=(4,)), masks={0: mask_of(4)}) == [4]


def test_what_is_not_finite_stays_so_behind_a_mask() -> None:
    for broken in (math.nan, math.inf):
        logits = descending()
        logits[0, 20] = broken
        assert tokens(logits, request(greedy()), masks={0: mask_of(3)}) == [None]


def test_what_is_said_of_a_token_is_what_the_model_has_whatever_the_mask() -> None:
    asked = request(greedy(num_logprobs=2))
    (token,) = sample(descending(), [asked], {0: mask_of(9)}).read()
    (free,) = sample(descending(), [asked]).read()
    assert token is not None and free is not None and token.logprobs is not None and free.logprobs is not None
    assert token.id == 9 and token.logprobs.rank == 10
    assert (token.logprobs.ids, token.logprobs.top) == (free.logprobs.ids, free.logprobs.top)


def test_penalties_are_of_what_the_first_lane_has_seen() -> None:
    logits = torch.full((1, VOCAB), -5.0)
    logits[0, [1, 2, 3, 4]] = torch.tensor([1.0, 0.9, 0.8, -0.1])
    for sampling, output, expected in (
        (greedy(repetition=1.1), (), 1),  # the prompt's: 1 / 1.1 is 0.91
        (greedy(repetition=1.2), (), 2),
        (greedy(presence=0.15), (), 1),  # of the output only
        (greedy(presence=0.15), (1,), 2),
        (greedy(frequency=0.06), (1,), 1),
        (greedy(frequency=0.06), (1, 1), 2),
        (greedy(frequency=-0.06, presence=0.0), (2, 2), 2),
        (greedy(repetition=1.2, bias={1: 0.15}), (), 1),  # bias first: 1.15 / 1.2
        (greedy(repetition=2.0), (2, 3, 3), 1),
    ):
        assert tokens(logits, request(sampling, (1,), output)) == [expected], (sampling, output)
    lanes = Request(0, [LaneSpec([1]), LaneSpec([2, 3])], 9, greedy(repetition=1.2))
    assert tokens(logits, lanes) == [2]  # what the second lane has seen does not count


def test_bias_and_penalties_move_what_is_drawn_from() -> None:
    logits = torch.zeros(1, VOCAB)
    only = {token: -100.0 for token in range(VOCAB) if token not in (4, 8)}
    biased = [request(Sampling(seed=seed, bias=only)) for seed in range(40)]
    assert {tokens(logits, it)[0] for it in biased} == {4, 8}
    penalised = [request(Sampling(seed=seed, bias=only, presence=200.0), output=(4,)) for seed in range(40)]
    assert {tokens(logits, it)[0] for it in penalised} == {8}


# -- what nobody should ask for ---


def test_ids_that_are_no_tokens_change_nothing() -> None:
    """Least of all in a neighbour's row."""
    logits = descending(3)
    odd = {-1: 100.0, VOCAB: 100.0, VOCAB + 7: 100.0, -VOCAB - 3: 100.0, 1 << 62: 100.0}
    rows = (request(greedy()), request(greedy(bias=odd)), request(greedy(bias={4: 1.0})))
    assert tokens(logits, *rows) == [0, 0, 4]
    banned = request(greedy(min_tokens=5), stops=(-1, VOCAB, VOCAB + 7, 1 << 62))
    assert tokens(logits, request(greedy()), banned, request(greedy(bias={4: 1.0}))) == [0, 0, 4]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_where_everything_is_banned_nothing_is(temperature: float) -> None:
    logits = descending(3)
    all_banned = request(Sampling(temperature=temperature, min_tokens=5), stops=tuple(range(VOCAB)))
    got = tokens(logits, request(greedy()), all_banned, request(greedy(min_tokens=5), stops=(0,)))
    assert got[0] == 0 and got[2] == 1 and got[1] is not None
    if temperature == 0:
        assert got[1] == 0


def test_a_temperature_beyond_all_bounds_keeps_bans() -> None:
    stops = tuple(range(1, VOCAB))
    for temperature in (1e20, 1e300):
        assert tokens(descending(), request(Sampling(temperature=temperature, min_tokens=2), stops=stops)) == [0]


def test_what_overflows_or_is_not_finite_fails_alone() -> None:
    logits = descending(5)
    logits[1, 3] = math.nan
    logits[2, 3] = math.inf
    rows = [request(greedy()), request(greedy(bias={1: 1.0})), request(greedy(presence=1.0)),
            request(greedy(bias={1: 1e300})), request(greedy(frequency=1e300), output=(3,))]  # fmt: skip
    got = tokens(logits, *rows)
    assert got[:4] == [0, None, None, None] and got[4] in (0, None)


def test_a_ban_hides_nothing_that_is_not_finite() -> None:
    for broken in (math.nan, math.inf):
        logits = descending(2)
        logits[0, 3] = broken
        rows = [request(greedy(min_tokens=2, num_logprobs=1), stops=(3,)), request(greedy(min_tokens=2), stops=(0,))]
        assert tokens(logits, *rows) == [None, 1]


@pytest.mark.parametrize("top_k", [-(1 << 62), 1 << 62])
def test_any_top_k(top_k: int) -> None:
    assert tokens(descending(), request(Sampling(top_k=top_k))) != [None]


def test_more_log_probabilities_than_there_are_tokens() -> None:
    (token,) = sample(descending(), [request(greedy(num_logprobs=1 << 40))]).read()
    assert token is not None and token.logprobs is not None and token.logprobs.ids == list(range(VOCAB))


# -- a batch ---

KINDS = [
    greedy(), Sampling(seed=3), greedy(bias={9: 3.0, 11: -2.0}), Sampling(seed=5, bias={9: 3.0}, top_p=0.8),
    greedy(presence=1.0, frequency=0.5, repetition=1.3), Sampling(seed=6, repetition=1.3, min_p=0.05),
    greedy(min_tokens=9), Sampling(seed=7, min_tokens=9, num_logprobs=3), greedy(num_logprobs=0),
    Sampling(seed=8, top_k=5, min_p=0.1), greedy(num_logprobs=5, presence=0.7),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_is_chosen_as_if_it_were_alone(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    logits = (2 * torch.randn(len(KINDS), VOCAB)).to(dtype)
    before = logits.clone()
    rows = [request(it, (1, 2), (5, 6, 5), stops=(3, 4)) for it in KINDS]
    together = sample(logits, rows).read()
    assert logits.equal(before)  # what the model says belongs to it
    for row, it in enumerate(rows):
        (alone,) = sample(logits[row : row + 1], [it]).read()
        assert same(together[row], alone), KINDS[row]
    for subset in ([0, 2], [2, 4, 6], [1, 2, 8], [0, 1, 8]):
        some = sample(logits[subset], [rows[row] for row in subset]).read()
        assert all(same(token, together[row]) for token, row in zip(some, subset, strict=True))


def same(one: Token | None, other: Token | None) -> bool:
    assert one is not None and other is not None
    if one.id != other.id or (one.logprobs is None) is not (other.logprobs is None):
        return False
    if one.logprobs is None or other.logprobs is None:
        return True
    values = [
        (it.rank, it.ids, [round(value, 4) for value in (it.chosen, *it.top)]) for it in (one.logprobs, other.logprobs)
    ]
    return values[0] == values[1]


def test_log_probabilities_are_of_what_the_model_says() -> None:
    """And of the token that was chosen for whatever reason; each row has as many as it asked for."""
    torch.manual_seed(4)
    logits = torch.randn(4, VOCAB)
    rows = [request(greedy(num_logprobs=2, bias={17: 50.0})), request(greedy()), request(greedy(num_logprobs=0)),
            request(Sampling(temperature=3.0, seed=4, num_logprobs=4, repetition=3.0))]  # fmt: skip
    got = sample(logits, rows).read()
    parts = logits.log_softmax(-1)
    assert got[0] is not None and got[0].id == 17
    for row, count in ((0, 2), (2, 0), (3, 4)):
        token = got[row]
        assert token is not None and token.logprobs is not None
        best = parts[row].sort(descending=True)
        said, own = token.logprobs, parts[row, token.id]
        assert said.ids == best.indices[:count].tolist() and said.rank == 1 + int((parts[row] > own).sum())
        assert [said.chosen, *said.top] == pytest.approx([own.item(), *best.values[:count].tolist()], abs=1e-5)
    assert got[1] is not None and got[1].logprobs is None


def test_a_token_that_the_model_gives_no_chance_has_a_number_all_the_same() -> None:
    logits = descending()
    logits[0, 5:] = -math.inf
    logits[0, 30] = -3e38
    (token,) = sample(logits, [request(greedy(num_logprobs=6, bias={30: 3.3e38}))]).read()
    assert token == Token(30, token.logprobs if token else None)
    assert token.logprobs is not None and (token.logprobs.chosen, token.logprobs.rank) == (-9999.0, 6)
    assert isinstance(token.logprobs, Logprobs) and token.logprobs.top[-1] == -9999.0


def test_plain_rows_pay_nothing_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an edited row, nothing is copied; beside some, only those are."""
    copied: list[int] = []

    def counting(logits: Tensor, edits: Edits, rows: Tensor) -> Tensor:
        copied.append(len(logits))
        return edited(logits, edits, rows)

    monkeypatch.setattr(kernels.sampling.reference, "edited", counting)
    plain = [request(greedy()), request(Sampling(seed=3, min_p=0.1)), request(greedy(min_tokens=2), stops=())]
    tokens(descending(3), *plain)
    tokens(descending(1), request(greedy(min_tokens=2), output=(7, 8), stops=(0,)))
    assert copied == []
    tokens(descending(4), *plain, request(greedy(bias={1: 1.0})))
    assert copied == [1]
    tokens(descending(4), *plain, request(greedy(), number=1), masks={1: mask_of(3)})
    assert copied == [1, 1]
