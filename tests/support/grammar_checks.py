"""Grammars on the demo's vocabulary, without the processes around them."""

import json
from random import Random
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from server.grammars import gbnf, matchers, vocabulary
from server.grammars.compose import composed
from server.grammars.source import GrammarSource, Kind
from server.grammars.vocabulary_spec import VocabularySpec
from tests.support.live_server import ROOT

VOCAB, STOP = 2048, 1
SPEC = VocabularySpec(str(ROOT / "demo" / "base"), VOCAB, (STOP,))


def load() -> LLTokenizer:
    return vocabulary.load(SPEC)


def matcher(tokens: LLTokenizer, kind: Kind, said: Any, **parts: str) -> LLMatcher:
    """`said`: the text, or what is JSON in it; `parts`: those of a source that are ours. Raises GrammarRefused and
    Refusal."""
    text = said if isinstance(said, str) else json.dumps(said)
    return matchers.matcher_of(tokens, composed(GrammarSource(kind, text, "p", **parts), gbnf.in_lark))


def takes(tokens: LLTokenizer, matcher: LLMatcher, text: str) -> bool:
    """Whether the whole text is an answer."""
    ids, copy = tokens.tokenize_str(text), matcher.deep_copy()
    return bool(copy.try_consume_tokens(ids) == len(ids) and copy.is_accepting())


def takes_value(tokens: LLTokenizer, matcher: LLMatcher, value: Any) -> bool:
    return takes(tokens, matcher, json.dumps(value, ensure_ascii=False))


def allowed(mask: bytes | memoryview, vocab_size: int = VOCAB) -> list[int]:
    bits = int.from_bytes(mask, "little")
    return [token for token in range(vocab_size) if bits >> token & 1]


def walk(tokens: LLTokenizer, matcher: LLMatcher, rng: Random, most: int = 400) -> str | None:
    """A random answer, which ends where it may and often closes what is open; None: it came to no end."""
    copy, said = matcher.deep_copy(), []
    for count in range(most):
        choices = allowed(copy.compute_bitmask())
        matchers.require_sound(copy)
        if STOP in choices and (count > 50 or rng.random() < 0.5 or choices == [STOP]):
            return tokens.decode_bytes(said).decode()
        choices = [it for it in choices if it != STOP]
        closing = [it for it in choices if tokens.decode_bytes([it])[:1] in b'"}],']
        token = rng.choice(closing if closing and rng.random() < 0.6 else choices)
        assert copy.consume_token(token)
        said.append(token)
    return None
