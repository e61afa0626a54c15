"""Grammars of calls: what they let a model write is read back as calls that follow the tools' schemas."""

import json
import random
from dataclasses import replace
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from server.api.texts.chat_template import Conversation
from server.api.texts.speaking import OneSpeaker
from server.api.texts.speech import Tool, ToolsWanted
from server.api.texts.text import Text
from tests.support.splits import split
from tests.support.tool_templates import KNOWN, text_with

WEATHER = Tool("get_weather", "The weather.", {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"},
                   "unit": {"enum": ["celsius", "kelvin"]}, "hourly": {"type": "boolean"},
                   "at": {"type": "array", "items": {"type": "integer"}, "maxItems": 2}},
    "required": ["city", "hourly"],
    "additionalProperties": False,
})  # fmt: skip
NOW = Tool("now", None, {})
REFERS = Tool("refers-to_it", None, {"$defs": {"n": {"type": "integer"}}, "properties": {"n": {"$ref": "#/$defs/n"}},
                                     "required": ["n"], "additionalProperties": False})  # fmt: skip
TOOLS = [WEATHER, NOW, REFERS]
USER = Conversation([{"role": "user", "content": "hi"}])
_CLOSING = '"}])>\n ,'  # letters that bring an end nearer
_PARAMETER_END = "</parameter>"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Text, LLTokenizer]]:
    made = {}
    for name, (template, _) in KNOWN.items():
        directory = tmp_path_factory.mktemp(name)
        text = text_with(template, directory)
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        made[name] = text, LLTokenizer(tokenizer.to_str(), eos_token=tokenizer.token_to_id("<|beyond|>"))
    return made


def speaker_of(text: Text, wanted: ToolsWanted) -> OneSpeaker:
    said = Conversation(USER.messages, tools=wanted.tools)
    speaker = text.speaker(said, text.encode_chat(said, 1_000_000)[-32:], wanted)
    assert isinstance(speaker, OneSpeaker)
    return speaker


def matcher(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    it = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(grammar))
    assert not it.is_error(), f"{it.get_error()}\n{grammar}"
    return it


def allowed(it: LLMatcher, size: int) -> list[int]:
    mask = int.from_bytes(it.compute_bitmask(), "little")
    return [token for token in range(size) if mask >> token & 1]


def walk(tokenizer: LLTokenizer, grammar: str, rng: random.Random) -> list[int]:
    """Tokens that the grammar allows one after another, at random; after a while those that bring an end nearer."""
    tokens: list[int] = []
    it, eos = matcher(tokenizer, grammar), tokenizer.eos_token
    end = tokenizer.tokenize_str(_PARAMETER_END)
    for step in range(2000):
        choices = allowed(it, tokenizer.vocab_size)
        assert choices, (it.get_error(), tokenizer.decode_str(tokens), grammar)
        if eos in choices and (step > 20 or len(choices) == 1 or rng.random() < 0.3):
            return tokens
        letters = [token for token in choices if token != eos and chr_of(tokenizer, token) < "\x7f"] or choices
        if step > 60 and rng.random() < 0.5 and it.validate_tokens(end) == len(end):
            tokens += end
            assert it.consume_tokens(end)
            continue
        if step > 60:
            letters = min(([token] for token in letters), key=lambda its: rank(tokenizer, its[0]))
        tokens.append(rng.choice(letters))
        assert it.consume_token(tokens[-1])
    raise AssertionError(f"no end: {tokenizer.decode_str(tokens)[-200:]!r}")


def chr_of(tokenizer: LLTokenizer, token: int) -> str:
    return tokenizer.decode_str([token])[:1] or "\x7f"


def rank(tokenizer: LLTokenizer, token: int) -> int:
    if tokenizer.is_special_token(token):
        return -1
    place = _CLOSING.find(tokenizer.decode_str([token]))
    return place if place >= 0 else len(_CLOSING)


def check_call(name: str | None, arguments: str) -> None:
    its: dict[str, Any] = json.loads(arguments)
    if name == "get_weather":
        assert {"city", "hourly"} <= set(its) <= {"city", "days", "unit", "hourly", "at"}
        assert isinstance(its["city"], str) and isinstance(its["hourly"], bool)
        assert isinstance(its.get("days", 0), int) and its.get("unit", "kelvin") in ("celsius", "kelvin")
        assert all(isinstance(it, int) for it in its.get("at", []))
    elif name == "refers-to_it":
        assert set(its) == {"n"} and isinstance(its["n"], int)
    else:
        assert name == "now" and its == {}


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("parallel", [True, False])
def test_forced_calls_are_read_back(texts: dict[str, tuple[Text, LLTokenizer]], name: str, parallel: bool) -> None:
    text, tokenizer = texts[name]
    speaker = speaker_of(text, ToolsWanted(TOOLS, must_call=True, parallel=parallel))
    assert speaker.answer is not None and speaker.answer == speaker.calls
    rng, counts = random.Random(name), set()
    for _ in range(12):
        tokens = walk(tokenizer, speaker.answer, rng)
        said = split(replace(speaker, is_open=False).splitter(), [text.decode([it]) for it in tokens])
        assert said.calls and not said.content, (text.decode(tokens), said)
        for call in said.calls:
            check_call(*call)
        counts.add(len(said.calls))
    assert parallel or counts == {1}


@pytest.mark.parametrize("name", KNOWN)
def test_only_what_may_be_called_is(texts: dict[str, tuple[Text, LLTokenizer]], name: str) -> None:
    text, tokenizer = texts[name]
    speaker = speaker_of(text, ToolsWanted(TOOLS, must_call=True, only=frozenset({"now"})))
    assert speaker.answer is not None
    tokens = walk(tokenizer, speaker.answer, random.Random(1))
    said = split(replace(speaker, is_open=False).splitter(), [text.decode(tokens)])
    assert {it for it, _ in said.calls} == {"now"}


@pytest.mark.parametrize("name", KNOWN)
def test_text_may_come_and_calls_of_strict_tools_follow_their_schemas(
    texts: dict[str, tuple[Text, LLTokenizer]], name: str
) -> None:
    text, tokenizer = texts[name]
    speaker = speaker_of(text, ToolsWanted([WEATHER._replace(is_strict=True), NOW]))
    assert speaker.answer is not None
    final = "<|channel|>final<|message|>" if name == "harmony" else ""
    assert accepts(tokenizer, speaker.answer, tokens_of(text, f"{final}Hello, {{it}} is [5]."))
    rng = random.Random(name)
    forced = speaker_of(text, ToolsWanted([WEATHER, NOW], must_call=True)).answer
    assert forced is not None
    lead = "Well. " if speaker.format is not None and speaker.format.trigger else ""
    for _ in range(5):
        calls = walk(tokenizer, forced, rng)
        assert accepts(tokenizer, speaker.answer, [*tokens_of(text, lead), *calls])
        other = text.decode(calls)
        for name_of_tool in ("get_weather", "now"):
            other = other.replace(name_of_tool, "another")
        assert not accepts(tokenizer, speaker.answer, tokens_of(text, lead + other))


def tokens_of(text: Text, said: str) -> list[int]:
    return text.encode([said], 10_000, "prompt", add_special_tokens=False)[0]


def accepts(tokenizer: LLTokenizer, grammar: str, tokens: list[int]) -> bool:
    it = matcher(tokenizer, grammar)
    return it.validate_tokens(tokens) == len(tokens) and it.consume_tokens(tokens) and it.is_accepting()


@pytest.mark.parametrize("name", KNOWN)
def test_reasoning_may_come_before_an_object_and_before_calls(
    texts: dict[str, tuple[Text, LLTokenizer]], name: str
) -> None:
    """As a source's `before`, `opening` and `instead` are put together with it."""
    text, tokenizer = texts[name]
    speaker = speaker_of(text, ToolsWanted(TOOLS))
    assert speaker.answer is None
    instead = f"| %lark {{\n{speaker.calls}\n}}"
    grammar = f'start: {speaker.before} ({speaker.opening} content {instead})\ncontent: %json {{"type": "object"}}'
    reasoning = {
        "think": "<think>\nHm.\n</think>\n\n",
        "harmony": "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant",
    }
    begun = "" if speaker.reasoning is None else reasoning[speaker.reasoning.name]
    if speaker.is_open:
        begun = begun.removeprefix("<think>\n")
    content = "<|channel|>final<|message|>" if name == "harmony" else ""
    assert accepts(tokenizer, grammar, tokens_of(text, f"{begun}{content}{{}}"))
    if begun and not speaker.is_open:
        assert accepts(tokenizer, grammar, tokens_of(text, f"{content}{{}}"))
    assert not accepts(tokenizer, grammar, tokens_of(text, f"{begun}{content}text"))
    rng = random.Random(name)
    for _ in range(3):
        calls = walk(tokenizer, speaker.calls, rng)
        assert accepts(tokenizer, grammar, [*tokens_of(text, begun), *calls])


def test_no_name_and_no_schema_gets_out_of_the_grammar(texts: dict[str, tuple[Text, LLTokenizer]]) -> None:
    text, tokenizer = texts["hermes"]
    names = ['a"b', "a\\", "a\n}", "<tool_call>", "</tool_call>", "é\u2028", "%json {}", "/*"]
    schema = {"type": "object", "properties": {it: {"const": it} for it in names}, "required": names}
    for format in KNOWN:
        speaker = speaker_of(texts[format][0], ToolsWanted([Tool("f", it, schema) for it in names], must_call=True))
        assert speaker.answer is not None
        matcher(texts[format][1], speaker.answer)
    speaker = speaker_of(text, ToolsWanted([Tool(it, None, {}) for it in names], must_call=True))
    assert speaker.answer is not None
    matcher(tokenizer, speaker.answer)


@pytest.mark.parametrize("name", KNOWN)
def test_grammars_grow_with_the_number_of_tools_and_no_faster(
    texts: dict[str, tuple[Text, LLTokenizer]], name: str
) -> None:
    sizes = []
    for count in (50, 100):
        tools = [WEATHER._replace(name=f"tool_{index:03}") for index in range(count)]
        speaker = speaker_of(texts[name][0], ToolsWanted(tools, must_call=True))
        sizes.append(len(speaker.answer or ""))
    assert sizes[1] < 2.1 * sizes[0] < 150_000
