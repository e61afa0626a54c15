"""Chat templates that adapters bring: the base's tokenizer, their own turns and control tokens."""

import json
import time
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from adapters_store.errors import InvalidManifest
from server.api.texts import adapter_texts
from server.api.texts.adapter_texts import AdapterTexts
from server.api.texts.chat_template import Conversation
from server.api.texts.text import Text
from server.errors import InvalidRequest
from tests.support.live_server import write_tokenizer

BASE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
OWN = "{% for m in messages %}<turn>{{ m.role }}: {{ m.content }}</turn>{% endfor %}<turn>"
ADDED = ["<|user|>", "<|assistant|>", "<turn>", "</turn>"]


def load(directory: Path, template: str | None = BASE, words: int = 0) -> Text:
    letters = sorted(set(map(chr, range(32, 127))))
    vocab = {word: index for index, word in enumerate([*letters, *(f"word{i}" for i in range(words))])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.add_tokens([AddedToken(it, special=False, normalized=False) for it in ADDED])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template} if template else {}))
    return Text.load(directory)


def tokens(text: Text, content: str) -> list[str]:
    names = {text._tokenizer.token_to_id(name): name for name in [*ADDED, "<|end|>"]}
    return [
        names[it] for it in text.encode_chat(Conversation([{"role": "user", "content": content}]), 1000) if it in names
    ]


def test_an_adapters_template_has_control_tokens_of_its_own(tmp_path: Path) -> None:
    base = load(tmp_path)
    own = base.with_template(OWN)
    said = "x<|user|>y</turn>z<|end|>"
    assert tokens(base, said) == ["<|user|>", "</turn>", "<|end|>", "<|assistant|>"]  # </turn> is a word to the base
    assert tokens(own, said) == ["<turn>", "<|user|>", "</turn>", "<turn>"]  # and <|user|> is one to the adapter
    assert own.render_chat(Conversation([{"role": "user", "content": "a"}])) == "<turn>user: a</turn><turn>"
    assert base.render_chat(Conversation([{"role": "user", "content": "a"}])) == "<|user|>a<|end|><|assistant|>"


def test_a_base_without_a_template_serves_adapters_that_have_one(tmp_path: Path) -> None:
    base = load(tmp_path, template=None)
    assert not base.has_chat_template
    assert tokens(base.with_template(OWN), "</turn>") == ["<turn>", "</turn>", "<turn>"]
    with pytest.raises(InvalidRequest, match="no chat template"):
        base.encode_chat(Conversation([{"role": "user", "content": "a"}]), 10)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "is broken: Expected"),
        ("{{ x|nosuch }}", "is broken: No filter named 'nosuch'"),
        ("{{ 'x' * 10 ** 10 }}", "fails on a plain message of a user: .*more than 8,388,608 characters"),
        ("{{ raise_exception('no') }}", "fails on a plain message of a user: .* no;"),
        ("{{ 1 / 0 }}", "fails on a plain message of a user: .*ZeroDivisionError"),
        ("{{ ''.__class__.__mro__ }}", "fails on a plain message of a user: .*unsafe"),
        ("{% include 'etc' %}", "fails on a plain message of a user"),
        ('{{ "\\ud800" }}', "not valid Unicode"),
        ("\ud800", "is broken|not valid Unicode"),
        ("(" * 70_000, "is broken: it has 70,000 characters, and at most 65,536"),
        ("{{ " + "(" * 9000 + " }}", "is broken"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(tmp_path: Path, template: str, message: str) -> None:
    with pytest.raises(InvalidManifest, match=message):
        load(tmp_path).with_template(template)


def test_one_more_template_costs_milliseconds_with_a_large_vocabulary(tmp_path: Path) -> None:
    text = load(tmp_path, words=128_000)
    start = time.process_time()
    text.with_template(OWN)
    assert time.process_time() - start < 0.05


def test_texts_are_kept_by_template_and_the_oldest_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_texts, "_MOST", 2)
    write_tokenizer(tmp_path)
    base = Text.load(tmp_path)
    texts = AdapterTexts(base)
    assert texts.for_template(None) is base
    first, second = texts.for_template("a"), texts.for_template("b")
    assert texts.for_template("a") is first and first is not second
    texts.for_template("c")  # b was used longest ago
    assert texts.for_template("a") is first
    assert texts.for_template("b") is not second
    with pytest.raises(InvalidManifest):
        texts.for_template("{% broken")
