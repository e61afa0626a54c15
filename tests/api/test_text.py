"""Text: stop strings in pieces, chat templates, characters of several tokens. And the sampler's draws."""

import json
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from server.api.texts.chat_template import Conversation
from server.api.texts.decoding import StopMatcher, StopStrings
from server.api.texts.text import Text
from server.engine.request import LaneSpec, Request, Sampling
from server.errors import ConfigError, InvalidRequest
from server.model.draws import uniform
from tests.support.live_server import write_tokenizer
from tests.support.sampled import sample


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_cut_at_the_first_complete_match_however_the_text_is_cut(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    matcher, sent, rest = StopMatcher(StopStrings(stops)), "", text
    while rest and not matcher.matched:
        size = data.draw(st.integers(1, len(rest)))
        sent += matcher.push(rest[:size])
        rest = rest[size:]
    if not matcher.matched:
        sent += matcher.flush()
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert (matcher.matched is not None) == bool(found)
    assert sent == (text[: min(found)[1]] if found else text)


@pytest.fixture
def text(tmp_path: Path) -> Text:
    write_tokenizer(tmp_path)
    return Text.load(tmp_path)


def test_a_character_of_several_tokens_comes_out_whole(text: Text) -> None:
    tokens = text.encode(["aé€b"], 100, "prompt")[0]
    assert len(tokens) == 7
    decoder = text.decoder()
    assert [decoder.push(token) for token in tokens] == ["a", "", "é", "", "", "€", "b"]


def test_chat_template(text: Text) -> None:
    assert text.render_chat(Conversation([{"role": "user", "content": "hi"}])) == "user: hi\nassistant:"
    with pytest.raises(InvalidRequest, match="no system here"):
        text.render_chat(Conversation([{"role": "system", "content": "hi"}]))


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ ''.__class__.__mro__ }}"}))
    with pytest.raises(InvalidRequest, match="unsafe|refuses"):
        Text.load(tmp_path).render_chat(Conversation([{"role": "user", "content": "x"}]))


def test_lone_surrogates_are_refused(text: Text) -> None:
    with pytest.raises(InvalidRequest, match="Unicode"):
        text.encode(["a\ud800"], 100, "prompt")


def test_a_model_without_a_fast_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokenizer.json"):
        Text.load(tmp_path)


# -- sampling ---

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0])


def sampled(logits: torch.Tensor, samplings: list[Sampling], indices: list[int]) -> list[int | None]:
    requests = [Request(0, [LaneSpec([0])], 1, it) for it in samplings]
    for request, index in zip(requests, indices, strict=True):
        request.first.tokens += [0] * index
    return [token and token.id for token in sample(logits, requests).read()]


def draws(sampling: Sampling, count: int) -> list[int | None]:
    return [sampled(LOGITS[None], [sampling], [index])[0] for index in range(count)]


def test_frequencies_follow_the_softmax() -> None:
    tokens = torch.tensor(draws(Sampling(temperature=0.7, seed=5), 4000))
    expected = (LOGITS / 0.7).softmax(-1)
    got = torch.bincount(tokens, minlength=5) / len(tokens)
    assert (got - expected).abs().max() < 0.02


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(temperature=0.0), {0}),
        (Sampling(top_k=1), {0}),
        (Sampling(top_k=2), {0, 1}),
        (Sampling(top_p=0.6), {0}),  # 0.64 crosses it
        (Sampling(top_p=0.7), {0, 1}),
        (Sampling(top_p=1e-9), {0}),
        (Sampling(top_k=3, top_p=0.95), {0, 1, 2}),
        (Sampling(temperature=2.0), {0, 1, 2, 3}),
    ],
    ids=str,
)
def test_top_k_and_top_p(sampling: Sampling, allowed: set[int]) -> None:
    assert set(draws(sampling, 300)) == allowed


def test_a_token_depends_on_its_seed_and_place_and_not_on_its_batch() -> None:
    samplings = [Sampling(seed=seed) for seed in range(20)]
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(1))
    together = sampled(logits, samplings, [3] * 20)
    alone = [sampled(logits[row : row + 1], [samplings[row]], [3])[0] for row in range(20)]
    assert together == alone
    seeds, indices = numpy.indices((50, 50)).reshape(2, -1)
    assert len(set(uniform(seeds.astype(numpy.uint64), indices).tolist())) == 2500


@pytest.mark.parametrize("temperature", [1e-38, 1e-45, 1e-300, 1e-6])
@pytest.mark.parametrize("top_p", [1.0, 1e-50, 1e-300])
def test_values_that_vanish_in_float32_are_greedy(temperature: float, top_p: float) -> None:
    assert sampled(LOGITS[None], [Sampling(temperature=temperature, top_p=top_p)], [0]) == [0]
    assert sampled(LOGITS[None], [Sampling(temperature=1.0, top_p=1e-50)], [0]) == [0]


def test_extreme_logits_still_give_a_token() -> None:
    logits = torch.tensor([[-1e30, 1e30, 0.0], [0.0, 0.0, 0.0]])
    tokens = sampled(logits, [Sampling(temperature=1e-3), Sampling(top_p=1e-6, temperature=2.0)], [0, 0])
    assert tokens == [1, 0]  # of equal ones the first


_LLAVA = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}<image>{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
    "{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
_MIXED = (  # the user's turn has parts, others are strings
    "{% for message in messages %}{{ message.role }}: {% if message.role == 'user' %}{{ message.content[0].text }}"
    "{% else %}{{ message.content }}{% endif %}{{ '\n' }}{% endfor %}"
)
_EITHER = (
    "{% for message in messages %}{{ message.role }}: {% if message.content is string %}{{ message.content }}"
    "{% else %}{{ message.content[0].text }} (in parts){% endif %}{{ '\n' }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (_LLAVA, "user: hi\nassistant: a <|end|>\nuser: b\nassistant:"),
        (_MIXED, "user: hi\nassistant: a <|end|>\nuser: b\n"),
        (_EITHER, "user: hi\nassistant: a <|end|>\nuser: b\n"),
        (
            "{% for it in messages %}{{ it.role }}: {{ it.content[:3] }} {% endfor %}",
            "user: hi assistant: a < user: b ",
        ),
    ],
)
def test_a_template_that_reads_parts_alone_is_given_parts(tmp_path: Path, template: str, expected: str) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    turns = [("user", "hi"), ("assistant", "a <|end|>"), ("user", "b")]
    said = Conversation([{"role": role, "content": content} for role, content in turns])
    assert Text.load(tmp_path).render_chat(said) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"chat_template.json": {"chat_template": "json"}}, "json"),
        ({"processor_config.json": {"chat_template": "processor", "processor_class": "LlavaProcessor"}}, "processor"),
        ({"processor_config.json": {"chat_template": "processor"}, "chat_template.json": {"chat_template": "json"}},
         "json"),
        ({"chat_template.json": {"chat_template": "json"}, "tokenizer_config.json": {"chat_template": "own"}}, "own"),
        ({"chat_template.json": {"chat_template": "json"}, "chat_template.jinja": "jinja"}, "jinja"),
        ({"processor_config.json": {"processor_class": "LlavaProcessor"}}, None),
    ],
)  # fmt: skip
def test_a_processors_template_is_found(tmp_path: Path, files: dict[str, object], expected: str | None) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    text = Text.load(tmp_path)
    assert text.has_chat_template == (expected is not None)
    if expected is not None:
        assert text.render_chat(Conversation([{"role": "user", "content": "hi"}])) == expected


def test_a_processors_file_that_is_no_json_is_told(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.json").write_text("{%")
    with pytest.raises(ConfigError, match="the chat template of .* cannot be read"):
        Text.load(tmp_path)
