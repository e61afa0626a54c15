"""Tokenizers of all kinds, as the library for grammars knows them."""

import json
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLTokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from server.grammars import gbnf, matchers, vocabulary
from server.grammars.compose import composed
from server.grammars.source import GrammarSource
from server.grammars.vocabulary_spec import VocabularySpec
from tests.support.grammar_checks import SPEC, allowed, takes

WORDS = ["<s>", "</s>", "<unk>", "▁yes", "▁no", "yes", "no", "▁", "a", "b", "é", '"', "{", "}", "1", ":"]


def _save(directory: Path, tokenizer: Tokenizer) -> VocabularySpec:
    tokenizer.save(str(directory / "tokenizer.json"))
    return VocabularySpec(str(directory), tokenizer.get_vocab_size(), (1,))


def _unigram(directory: Path, decoder: Any) -> VocabularySpec:
    tokenizer = Tokenizer(models.Unigram([(word, -float(index)) for index, word in enumerate(WORDS)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return _save(directory, tokenizer)


def _choices(tokens: LLTokenizer, *choices: str) -> Any:
    return matchers.matcher_of(tokens, composed(GrammarSource("choice", json.dumps(choices), "p"), gbnf.in_lark))


def test_a_tokenizer_that_the_library_does_not_know_gets_its_bytes_from_us(tmp_path: Path) -> None:
    tokens = vocabulary.load(_unigram(tmp_path, decoders.Metaspace()))
    names = {WORDS[it] for it in allowed(_choices(tokens, "yes", " no").compute_bitmask(), len(WORDS))}
    assert names == {"yes", "▁no", "▁"}
    assert tokens.is_special_token(0) and tokens.eos_tokens == [1]


def test_bytes_of_pieces(tmp_path: Path) -> None:
    vocab = {word: index for index, word in enumerate([*WORDS, *(f"<0x{byte:02X}>" for byte in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    tokens = vocabulary.load(_save(tmp_path, tokenizer))
    made = _choices(tokens, "€")
    assert tokens.decode_bytes(allowed(made.compute_bitmask(), len(vocab))) == b"\xe2"
    assert takes(tokens, made, "€") and not takes(tokens, made, "e")


def test_a_model_of_more_rows_than_tokens_and_of_fewer(tmp_path: Path) -> None:
    spec = _unigram(tmp_path, decoders.Metaspace())
    for size in (5, 200):
        tokens = vocabulary.load(VocabularySpec(spec.model_dir, size, spec.stop_token_ids))
        assert tokens.vocab_size == max(size, len(WORDS))
        assert max(allowed(_choices(tokens, "yes", " no", "<[150]>").compute_bitmask(), tokens.vocab_size)) < len(WORDS)
    more = VocabularySpec(SPEC.model_dir, 2100, SPEC.stop_token_ids)
    assert vocabulary.load(more).vocab_size == 2100


def test_a_gap_between_token_ids(tmp_path: Path) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1} | {letter: index + 10 for index, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokens = vocabulary.load(_save(tmp_path, tokenizer))
    assert tokens.vocab_size == 266
    made = _choices(tokens, "é")
    (first,) = allowed(made.compute_bitmask(), 266)
    assert first == vocab["Ã"] and takes(tokens, made, "é")


def test_neither_padding_nor_cutting_is_taken_over(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(f"{SPEC.model_dir}/tokenizer.json")
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(2)
    tokens = vocabulary.load(_save(tmp_path, tokenizer))
    assert takes(tokens, _choices(tokens, "one two three four five"), "one two three four five")


@pytest.mark.parametrize(
    ("text", "stops", "said"),
    [("{", (1,), "cannot be read"), ("[]", (1,), "is no object"), ("{}", (1,), "cannot be read"),
     (None, (), "names no stop token"), (None, (99_999,), "names no stop token")],
)  # fmt: skip
def test_what_cannot_be_used(tmp_path: Path, text: str | None, stops: tuple[int, ...], said: str) -> None:
    spec = _unigram(tmp_path, decoders.Metaspace())
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(vocabulary.NoVocabulary, match=said):
        vocabulary.load(VocabularySpec(spec.model_dir, spec.vocab_size, stops))
