"""The oracle for what requests ask beside tokens: log-probabilities, the ways to choose, and pooled hidden states.

Transformers is the judge throughout: its log_softmax on merged weights, its logits processors, its last_hidden_state.
The engine is the real one, over tiny models in float32: prompts are cut, requests and adapters mix.
"""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from adapters_store.ref import AdapterRef
from server.engine.request import FinishReason, Logprobs, OfPrompt, Sampling
from server.model.probe import PROBE
from tests.support.breadth import always
from tests.support.engine_harness import GREEDY, Answer, Engine, prompts
from tests.support.tiny_adapters import ALL_LINEARS, ATTENTION, merge, register, save_esft, save_lora
from tests.support.tiny_models import make_model

ATOL = 1e-4  # of logarithms around -5, and of hidden states around 1: float32 sums in another order
NEW_TOKENS = 8
DENSE = pytest.param("llama")
MIXTURE = pytest.param("qwen3_moe")
MORE = [pytest.param(name, marks=pytest.mark.thorough) for name in ("gemma2", "deepseek_v2", "gpt_oss")]

Models = dict[AdapterRef | None, nn.Module]


def served(name: str, root: Path, **settings: Any) -> tuple[Engine, Models]:
    """An engine with adapters, and what Transformers makes of each alone."""
    engine = Engine(make_model(name, attention=PROBE), **settings)
    plain = make_model(name)
    paths = [save_lora(root / "lora", plain, 1, ALL_LINEARS if name == "llama" else ATTENTION, rank=6)]
    if name == "llama":
        paths.append(save_lora(root / "head", plain, 2, ("v_proj", "lm_head"), rank=3))
    if name in ("qwen3_moe", "deepseek_v2"):
        paths.append(save_esft(root / "esft", plain, 3, {1: [5, 0, 3], 2: [7], 3: [2, 6]}))
    entries = [register(engine, path) for path in paths]
    engine.bring_in(entries)
    return engine, {None: plain} | {entry.ref: merge(make_model(name), entry) for entry in entries}


@torch.inference_mode()
def logprobs_of(model: nn.Module, tokens: Sequence[int]) -> Tensor:
    """[tokens, V]: of what follows each."""
    logits: Tensor = model(torch.tensor([list(tokens)])).logits[0]
    return logits.log_softmax(-1)


@torch.inference_mode()
def hidden_of(model: Any, tokens: Sequence[int]) -> Tensor:
    """[tokens, H]"""
    states: Tensor = model.base_model(torch.tensor([list(tokens)])).last_hidden_state[0]
    return states


def agree(said: Logprobs, row: Tensor, token: int, num: int) -> None:
    """What is said of a token, with a row of log-probabilities [V]."""
    best = row.topk(num)
    assert said.rank == 1 + int((row > row[token]).sum())
    assert len(set(said.ids)) == len(said.ids) == len(said.top) == num
    assert said.chosen == pytest.approx(row[token].item(), abs=ATOL)
    assert said.top == pytest.approx(best.values.tolist(), abs=ATOL)
    assert said.top == pytest.approx(row[said.ids].tolist(), abs=ATOL)  # which token of two alike is another's rounding


def vector_of(answer: Answer) -> Tensor:
    assert answer.told is not None and answer.told.vector is not None, answer.error
    return torch.from_numpy(numpy.frombuffer(answer.told.vector, "<f4").copy())


def tokens_agree(answer: Answer, parts: Tensor) -> None:
    """What is said of generated tokens, with rows from the prompt's last token on."""
    num = answer.sampling.num_logprobs
    for row, token, said in zip(parts, answer.tokens, answer.logprobs, strict=False):
        assert (said is None) is (num is None)
        if said is not None and num is not None:
            agree(said, row, token, num)


def all_agree(answers: Sequence[Answer], models: Models) -> None:
    """Everything that is said of these."""
    for answer in answers:
        assert answer.finish is FinishReason.LENGTH, answer.error
        parts = logprobs_of(models[answer.adapter], [*answer.prompt, *answer.tokens])
        first = len(answer.prompt) - 1
        tokens_agree(answer, parts[first:])
        asked = answer.of_prompt
        if asked is None:
            assert answer.told is None
            continue
        assert answer.told is not None
        assert (answer.told.logprobs is None) is (asked.num_logprobs is None)
        if answer.told.logprobs is not None and asked.num_logprobs is not None:
            assert len(answer.told.logprobs) == first
            for index, said in enumerate(answer.told.logprobs):
                agree(said, parts[index], answer.prompt[index + 1], asked.num_logprobs)
        assert (answer.told.vector is None) is (asked.pooling is None)
        if asked.pooling is not None:
            states = hidden_of(models[answer.adapter], answer.prompt)
            pooled = states.mean(0) if asked.pooling == "mean" else states[-1]
            torch.testing.assert_close(vector_of(answer), pooled, atol=ATOL, rtol=0)


# -- what is told ---

ASKS = [OfPrompt(3), None, OfPrompt(0), OfPrompt(pooling="mean"), OfPrompt(pooling="last"), OfPrompt(5, "mean"),
        OfPrompt(1, "last"), None]  # fmt: skip


def add_all_kinds(engine: Engine, models: Models, count: int, longest: int = 33, times: int = 1) -> list[Answer]:
    """Prompts of 1 to `longest` tokens, each asked about in another way, for the base and every adapter in turn."""
    told = [None, 0, 4, 1, 20]
    answers = []
    for index, prompt in enumerate(prompts(count, longest=longest)):
        asks = ASKS[index % len(ASKS)]
        sampling = Sampling(temperature=[0.0, 1.0][index % 2], seed=index, num_logprobs=told[index % len(told)])
        max_tokens = 0 if asks is not None and asks.pooling is not None else NEW_TOKENS
        ref = list(models)[index % len(models)]
        answers += [engine.add(prompt, max_tokens, ref, sampling, of_prompt=asks) for _ in range(times)]
    return answers


@pytest.mark.parametrize("name", [DENSE, MIXTURE, *MORE])
def test_log_probabilities_and_hidden_states_are_those_of_merged_models(name: str, tmp_path: Path) -> None:
    """In steps that mix all kinds and all adapters, and cut the prompts."""
    engine, models = served(name, tmp_path)
    answers = add_all_kinds(engine, models, 24)
    engine.run()
    all_agree(answers, models)
    assert max(len(slots) for slots in engine.slots_of_steps) == len(models)
    # and the adapters are in it: the same prompt gives other numbers through each
    pooled = [engine.add(prompts(2)[1], 0, ref, of_prompt=OfPrompt(0, "mean")) for ref in models]
    engine.run()
    vectors = [vector_of(it) for it in pooled]
    for index, vector in enumerate(vectors):
        assert all((vector - other).abs().max() > 100 * ATOL for other in vectors[:index])


@pytest.mark.parametrize("name", [DENSE, MIXTURE])
def test_nothing_is_lost_or_told_twice_where_memory_is_short(name: str, tmp_path: Path) -> None:
    """Preempted and computed anew, some of it beside the prefixes that others left."""
    info = Engine(make_model(name, attention=PROBE)).assembly.info
    engine, models = served(name, tmp_path, tokens_per_step=8,
                            kv_cache_bytes=11 * 4 * (info.kv_cache_bytes // info.kv_cache_tokens))  # fmt: skip
    answers = add_all_kinds(engine, models, 24, longest=28, times=2)
    begun_anew: set[int] = set()

    def between(step: int) -> None:
        begun_anew.update(it.id for it in engine.scheduler.waiting if it.first.carried is not None)

    engine.run(between)
    all_agree(answers, models)
    assert begun_anew and engine.assembly.kv_cache.num_prefix_hits > 0


def test_the_last_hidden_state_behind_a_cached_prefix_and_the_mean_past_it(tmp_path: Path) -> None:
    engine, models = served("qwen3_moe", tmp_path)
    prompt = prompts(2)[1]
    for ref in models:
        before = [engine.add(prompt, 0, ref, of_prompt=OfPrompt(pooling=it)) for it in ("last", "mean")]
        engine.run()
        after = [engine.add(prompt, 0, ref, of_prompt=OfPrompt(pooling=it)) for it in ("last", "mean")]
        engine.run()
        all_agree([*before, *after], models)
        assert [it.num_cached_tokens for it in after] == [32, 0]  # of 33: "mean" takes every token


def test_a_prompt_in_one_piece_is_told_of_as_one_in_many(tmp_path: Path) -> None:
    answers: list[list[Answer]] = []
    for tokens_per_step in (512, 9):
        engine, models = served("llama", tmp_path / str(tokens_per_step), tokens_per_step=tokens_per_step)
        answers.append([engine.add(prompts(2)[1], 0, ref, of_prompt=OfPrompt(2, "mean")) for ref in models])
        engine.run()
        all_agree(answers[-1], models)
    for whole, cut in zip(*answers, strict=True):
        torch.testing.assert_close(vector_of(whole), vector_of(cut), atol=1e-5, rtol=0)


# -- how tokens are chosen ---


class FrequencyAndPresence(LogitsProcessor):  # type: ignore[misc]
    """As OpenAI defines them, over generated tokens."""

    def __init__(self, prompt_len: int, frequency: float, presence: float) -> None:
        self._prompt_len, self._frequency, self._presence = prompt_len, frequency, presence

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        counts = torch.zeros_like(scores)
        for row, ids in enumerate(input_ids):
            for token in ids[self._prompt_len :].tolist():
                counts[row, token] += 1
        return scores - self._frequency * counts - self._presence * (counts > 0)


def processors(it: Sampling, prompt_len: int, stops: frozenset[int] = frozenset()) -> LogitsProcessorList:
    """Transformers' own for each thing that a request can ask for, in the order that the engine promises."""
    made: list[Any] = []
    if it.bias:
        made.append(SequenceBiasLogitsProcessor([[[token], value] for token, value in it.bias.items()]))
    if it.min_tokens and stops:
        made.append(MinNewTokensLengthLogitsProcessor(prompt_len, it.min_tokens, sorted(stops)))
    if it.repetition != 1:
        made.append(RepetitionPenaltyLogitsProcessor(it.repetition))
    if it.frequency or it.presence:
        made.append(FrequencyAndPresence(prompt_len, it.frequency, it.presence))
    if it.temperature:
        made.append(TemperatureLogitsWarper(it.temperature))
        made += [TopKLogitsWarper(it.top_k)] if it.top_k else []
        made += [MinPLogitsWarper(it.min_p)] if it.min_p else []
        made += [TopPLogitsWarper(it.top_p)] if it.top_p < 1 else []
    return LogitsProcessorList(made)


WAYS = {
    "bias": Sampling(temperature=0.0, num_logprobs=3, bias={7: 3.0, 50: 2.5, 120: -4.0, 198: 2.0}),
    "repetition": Sampling(temperature=0.0, repetition=1.4),
    "encouraged": Sampling(temperature=0.0, repetition=0.6),
    "presence": Sampling(temperature=0.0, presence=2.0),
    "frequency": Sampling(temperature=0.0, frequency=1.5),
    "negative": Sampling(temperature=0.0, frequency=-0.9, presence=-0.4),
    "min_tokens": Sampling(temperature=0.0, min_tokens=7),
    "all": Sampling(temperature=0.0, bias={7: 1.0, 50: -2.0}, repetition=1.2, presence=0.7, frequency=0.4,
                    min_tokens=5, num_logprobs=0),
}  # fmt: skip


@pytest.mark.parametrize("name", always(["llama", "qwen3_moe"], "llama"))
def test_greedy_tokens_are_those_of_transformers_processors(name: str, tmp_path: Path) -> None:
    """All ways at once in one batch, for the base and adapters, beside requests that ask for none of it."""
    engine, models = served(name, tmp_path, max_running=12)
    asked: list[tuple[str, Answer]] = []
    plain: list[Answer] = []
    stops: dict[tuple[int, ...], frozenset[int]] = {}
    for index, prompt in enumerate(prompts(6)):
        ref = list(models)[index % len(models)]
        usual = generated(models[ref], prompt, GREEDY)
        stops[tuple(prompt)] = frozenset(usual[1:3])  # what it would soon say
        plain.append(engine.add(prompt, 12, ref))
        asked += [
            (way, engine.add(prompt, 12, ref, it, stops[tuple(prompt)] if it.min_tokens else frozenset()))
            for way, it in WAYS.items()
        ]
    engine.run()
    changed: set[str] = set()
    for way, answer in asked:
        own_stops = stops[tuple(answer.prompt)] if answer.sampling.min_tokens else frozenset()
        wanted = generated(models[answer.adapter], answer.prompt, answer.sampling, own_stops)
        assert answer.tokens == wanted, (way, answer.adapter)
        # and what is said of them is of the model's own logits
        parts = logprobs_of(models[answer.adapter], [*answer.prompt, *answer.tokens])
        tokens_agree(answer, parts[len(answer.prompt) - 1 :])
        if answer.tokens != generated(models[answer.adapter], answer.prompt, GREEDY, own_stops):
            changed.add(way)
    assert changed == set(WAYS)  # each makes a difference somewhere
    for answer in plain:
        assert answer.tokens == generated(models[answer.adapter], answer.prompt, GREEDY)


@torch.inference_mode()
def generated(model: Any, prompt: list[int], sampling: Sampling, stops: frozenset[int] = frozenset()) -> list[int]:
    """Greedily, by Transformers' generate, up to the first stop token."""
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None,
                         logits_processor=processors(sampling, len(prompt), stops))  # fmt: skip
    tokens: list[int] = ids[0, len(prompt) :].tolist()
    end = next((index for index, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[: end + 1]


# -- how often ---

FEW = 11  # tokens of the vocabulary: pairs of them can be counted
DRAWS = 3000
DISTRIBUTIONS = {
    "temperature": Sampling(temperature=1.7),
    "cold": Sampling(temperature=0.5),
    "top_k": Sampling(top_k=4),
    "top_p": Sampling(top_p=0.7, temperature=1.2),
    "min_p": Sampling(min_p=0.2),
    "cuts": Sampling(top_k=8, min_p=0.05, top_p=0.9, temperature=1.5),
    "penalties": Sampling(repetition=1.5, presence=0.8, frequency=0.4),
    "everything": Sampling(temperature=1.3, top_p=0.92, min_p=0.02, repetition=1.2, presence=0.5,
                           bias={2: 1.5, 9: -1.0}, min_tokens=2),
}  # fmt: skip


@pytest.fixture(scope="module")
def small() -> tuple[Engine, nn.Module]:
    sizes = dict(vocab_size=FEW, num_hidden_layers=2, hidden_size=32, intermediate_size=40)
    engine = Engine(make_model("llama", attention=PROBE, **sizes), max_running=128, tokens_per_step=512,
                    max_waiting=2 * DRAWS, kv_cache_bytes=1 << 24)  # fmt: skip
    return engine, make_model("llama", **sizes)


@torch.inference_mode()
def pair_probabilities(model: nn.Module, prompt: list[int], sampling: Sampling, stops: frozenset[int]) -> Tensor:
    """[FEW, FEW]: of the first two tokens, exactly. A first one that ends the answer has no second."""
    apply = processors(sampling, len(prompt), stops)

    def after(tokens: list[int]) -> Tensor:
        ids = torch.tensor([tokens])
        probabilities: Tensor = apply(ids, model(ids).logits[:, -1]).double().softmax(-1)[0]
        return probabilities

    first = after(prompt)
    rows = [first[token] * after([*prompt, token]) for token in range(FEW)]
    return torch.stack(rows)


def chi_square(counts: Tensor, expected: Tensor) -> tuple[float, float]:
    """The statistic, with rare cells taken together, and what it exceeds once in ten thousand times (Wilson and
    Hilferty's approximation)."""
    counts, expected = counts.flatten().double(), expected.flatten()
    rare = expected < 5
    cells = [*zip(counts[~rare].tolist(), expected[~rare].tolist(), strict=True)]
    if expected[rare].sum() >= 5:
        cells.append((counts[rare].sum().item(), expected[rare].sum().item()))
    freedom = len(cells) - 1
    critical = freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3
    return sum((count - wanted) ** 2 / wanted for count, wanted in cells), critical


@pytest.mark.parametrize("way", always(DISTRIBUTIONS, "top_k", "top_p", "min_p", "penalties", "everything"))
def test_tokens_are_drawn_as_often_as_transformers_says(way: str, small: tuple[Engine, nn.Module]) -> None:
    """Pairs of tokens, so that penalties of what was generated count; the seeds are fixed, so this never wavers."""
    engine, model = small
    sampling, prompt, stops = DISTRIBUTIONS[way], [3, 8, 3, 10, 5], frozenset([4])
    answers = [engine.add(prompt, 2, None, msgspec.structs.replace(sampling, seed=seed),
                          stops if sampling.min_tokens else frozenset()) for seed in range(DRAWS)]  # fmt: skip
    engine.run()
    counts = torch.zeros(FEW, FEW)
    for answer in answers:
        counts[tuple(answer.tokens)] += 1
    exact = pair_probabilities(model, prompt, sampling, stops if sampling.min_tokens else frozenset())
    assert not counts[exact == 0].any(), "a token was drawn that is cut"
    statistic, critical = chi_square(counts, DRAWS * exact)
    assert statistic < critical
    # and it would have been found: the same counts are far from what another way gives
    other, bound = chi_square(counts, DRAWS * pair_probabilities(model, prompt, Sampling(), frozenset()))
    assert other > 2 * bound


def test_the_same_seed_says_the_same_alone_and_in_a_crowd(tmp_path: Path) -> None:
    """Whatever the others are and want: adapters, penalties, log-probabilities, prompts to be told of, and aborts."""
    engine, models = served("qwen3_moe", tmp_path, max_running=12, tokens_per_step=32)
    ways = [*WAYS.values(), *DISTRIBUTIONS.values(), Sampling(num_logprobs=4)]
    samplings = [msgspec.structs.replace(it, temperature=it.temperature or 0.9, seed=90 + index)
                 for index, it in enumerate(ways)]  # fmt: skip
    watched = [(prompt, list(models)[index % len(models)], samplings[index])
               for index, prompt in enumerate(prompts(len(samplings), seed=3))]  # fmt: skip
    alone = []
    for prompt, ref, sampling in watched:
        alone.append(engine.add(prompt, 10, ref, sampling))
        engine.run()
    rng = random.Random(5)
    crowd: list[Answer] = []

    def between(step: int) -> None:
        if step < 40:
            crowd.extend(add_all_kinds(engine, models, 3))
            crowd.append(engine.add(prompts(4)[step % 4], 8, list(models)[step % 3], rng.choice(samplings)))
        if step % 5 == 4:
            engine.abort(rng.choice(crowd))

    together = [engine.add(prompt, 10, ref, sampling) for prompt, ref, sampling in watched]
    engine.run(between)
    assert [it.tokens for it in together] == [it.tokens for it in alone]
    assert all(it.error is None for it in (*crowd, *together))
    assert len({tuple(it.tokens) for it in alone}) == len(alone)
