"""The model's tokens as llguidance knows them. Imported in the two processes of this room only."""

import json
from collections.abc import Sequence
from pathlib import Path

from llguidance import LLTokenizer, TokenizerWrapper
from tokenizers import Tokenizer

from server.grammars.vocabulary_spec import VocabularySpec
from server.token_bytes import TokenBytes

_FILE = "tokenizer.json"


class NoVocabulary(Exception):
    """Nothing can be constrained with this tokenizer; says why."""


class _Vocabulary:
    """What llguidance asks of a tokenizer that it cannot read by itself."""

    def __init__(self, tokenizer: Tokenizer, spec: VocabularySpec, stop_token_ids: Sequence[int]) -> None:
        self._tokenizer, bytes_of = tokenizer, TokenBytes(tokenizer)
        self.eos_token_id, self.bos_token_id = stop_token_ids[0], None
        count = max(_num_ids(tokenizer), spec.vocab_size)
        # an added token like <...> can mean something to a grammar, and is no text
        added = tokenizer.get_added_tokens_decoder()
        self.special_token_ids = [
            token for token, it in added.items() if it.special or (it.content[:1] == "<" and it.content[-1:] == ">")
        ]
        nameless = [token for token in range(count) if tokenizer.id_to_token(token) is None]
        self.tokens = [bytes_of.of(token) for token in range(count)]
        for token in nameless:
            self.tokens[token] = f"<[{token}]>".encode()
        self.special_token_ids += nameless

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids


def load(spec: VocabularySpec) -> LLTokenizer:
    """Takes a second for 150,000 tokens. Raises NoVocabulary."""
    text = _text(Path(spec.model_dir) / _FILE)
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # of whatever type the library finds
        raise NoVocabulary(f"its {_FILE} cannot be read") from error
    # those of the model that the tokenizer knows: others are never generated as such
    stops = [token for token in sorted(spec.stop_token_ids) if tokenizer.id_to_token(token) is not None]
    if not stops:
        raise NoVocabulary("the model names no stop token that its tokenizer knows, so that no answer would end")
    is_dense = _num_ids(tokenizer) == tokenizer.get_vocab_size()  # the library would miss tokens behind a gap
    try:
        if is_dense:
            return LLTokenizer(text, n_vocab=max(tokenizer.get_vocab_size(), spec.vocab_size), eos_token=stops)
    except BaseException as error:  # a panic of the library's is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
    try:
        return LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer, spec, stops)), eos_token=stops)
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise NoVocabulary("the library for grammars does not understand its tokens") from error


def _num_ids(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def _text(file: Path) -> str:
    """Of the tokenizer, which shall neither pad nor cut."""
    try:
        described = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise NoVocabulary(f"its {_FILE} cannot be read") from error
    if not isinstance(described, dict):
        raise NoVocabulary(f"its {_FILE} is no object")
    described |= {"padding": None, "truncation": None}
    return json.dumps(described)
