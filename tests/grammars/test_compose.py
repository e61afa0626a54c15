"""From what a request says to a grammar: what it takes, and every way to be refused."""

import json
from typing import Any

import pytest
from llguidance import LLTokenizer

from server.grammars import limits
from server.grammars.compose import composed
from server.grammars.gbnf import in_lark
from server.grammars.matchers import Refusal
from server.grammars.refused import GrammarRefused
from server.grammars.source import GrammarSource, Kind
from tests.support.grammar_checks import STOP, allowed, load, matcher, takes


@pytest.fixture(scope="module")
def tokens() -> LLTokenizer:
    return load()


@pytest.mark.parametrize(
    ("kind", "said", "right", "wrong"),
    [
        ("json_schema", {"type": "integer"}, ["1", " 1", "\n\n-3"], ["", "1 ", "1.5", '"1"', "\x0b1"]),
        ("json_schema", True, ["{}", "[1, true, null]", ' "a"'], ["", "{a: 1}", "[1,]"]),
        ("json_schema", {"const": {"a": [1]}}, ['{"a":[1]}', '{ "a" : [1 ] }'], ['{"a":[2]}', '{"b":[1]}']),
        ("json_schema", {"const": "<|end|>x"}, [], ['"<|end|>"']),
        ("json_schema", {"properties": {"a": {"const": 1}}}, ['{"a":1, "b":"\\n"}'], ['{"a":1,"\\u0061":2}']),
        ("regex", "a|bc", ["a", "bc"], ["abc", "ac", " a", ""]),
        ("regex", "^a/b$", ["a/b"], ["a/bc", "xa/b"]),
        ("regex", r"a\/[/]b", ["a//b"], ["a/b"]),
        ("regex", "", [""], ["a"]),
        ("regex", r"(?s).\p{L}\d", ["\né0", "xa7"], ["x\n7"]),
        ("choice", ["yes", "no", "yes!"], ["yes", "no", "yes!"], ["", "y", "yesno", " yes"]),
        ("choice", ['a"b', "a\\b", "\x00\x7f\n", "é😀", "/x/", "%json {", "a//b", "#"],
         ['a"b', "a\\b", "\x00\x7f\n", "é😀", "/x/", "%json {", "a//b", "#"], ["a", "b", "/x"]),
        ("ebnf", 'root ::= "a" [0-9]+ end\nend ::= "!" | "?"', ["a1!", "a22?"], ["a!", "a1", "1!"]),
        ("ebnf", 'root ::= [a&&b~~-]+ "[c--e]" [[x] # [a&&b]', ["a&b~-[c--e][", "b[c--e]x"], ["d[c--e]x", "a[d]x"]),
        ("ebnf", 'start: "a" INT "\\n"\n%import common.INT', ["a1\n", "a22\n"], ["a", "a1"]),
        ("ebnf", 'start: "<|end|>"? x ~ 2..3 // <not this>\nx: /[<@%]/ # nor @this', ["<@", "%%%"], ["<", "<<<<"]),
        ("ebnf", 'start: head "z"\nhead[lazy]: /a*b/', ["bz", "aabz"], ["abbz"]),
        ("ebnf", 'root ::= "x" # <|end|> @a %json\n', ["x"], ["xx"]),
        ("ebnf", 'start: x y\nx[capture]: /a*/\ny[capture="b", suffix="z"]: /b*/', ["aabz", "z"], ["aab"]),
        ("lark", 'start: "f(" %json {"type": "integer", "format": "made up"} ")"', ["f(1)", "f(-20)"], ["f()", "f(a)"]),
    ],
)  # fmt: skip
def test_what_is_taken(tokens: LLTokenizer, kind: Kind, said: Any, right: list[str], wrong: list[str]) -> None:
    made = matcher(tokens, kind, said)
    assert [it for it in right if not takes(tokens, made, it)] == []
    assert [it for it in wrong if takes(tokens, made, it)] == []


def test_content_may_have_an_opening_that_what_stands_instead_has_not(tokens: LLTokenizer) -> None:
    made = matcher(tokens, "regex", "[0-9]+", before='"<"?', opening='"final: "', instead='start: "call"')
    for text, is_whole in (("final: 12", True), ("<final: 12", True), ("<call", True), ("call", True), ("12", False),
                           ("final: call", False), ("<12", False)):  # fmt: skip
        assert takes(tokens, made, text) == is_whole, text


def test_what_comes_before_and_what_may_stand_instead(tokens: LLTokenizer) -> None:
    calls = 'start: "<call>" %json {"type": "object", "uniqueItems": false} "</call>"'
    made = matcher(tokens, "json_schema", {"type": "object"}, before='("<think>" /[a-z ]*/ "</think>")?', instead=calls)
    assert takes(tokens, made, "{}") and takes(tokens, made, '<think>so it is</think> {"a": 1}')
    assert takes(tokens, made, '<call>{"x": {}}</call>') and takes(tokens, made, "<think></think>\n<call>{}</call>")
    assert not takes(tokens, made, "<think>so</think>") and not takes(tokens, made, "<call>{}</call>{}")


def test_rules_of_a_client_are_not_ours(tokens: LLTokenizer) -> None:
    made = matcher(tokens, "ebnf", 'start: before\nbefore: answer\nanswer: SPACE\nSPACE: "s"', before='"b"')
    assert takes(tokens, made, "bs") and not takes(tokens, made, "b")


def test_text_that_spells_a_control_token_is_never_that_token(tokens: LLTokenizer) -> None:
    """Bytes that are certain must not be forced as the tokenizer writes them."""
    for kind, said in (("choice", ["<|end|>x"]), ("regex", "<\\|end\\|>"), ("json_schema", {"const": "<|end|>"})):
        made, text = matcher(tokens, kind, said), b""
        for _ in range(30):
            token = next((it for it in allowed(made.compute_bitmask()) if it != STOP), None)
            if token is None:
                break
            assert not tokens.is_special_token(token)
            text += tokens.decode_bytes([token])
            assert made.consume_token(token)
        assert b"<|end|>" in text


def test_whitespace_comes_to_an_end(tokens: LLTokenizer) -> None:
    made = matcher(tokens, "json_schema", {"type": "array", "items": {"type": "null"}})
    indent = " " * limits.MAX_INDENT
    for space in (" " * limits.MAX_SPACES, "\t", "\n", "\r\n", "\n" + indent):
        for place in ("[{}]", "[null{}]", "[null{},null]", "[null,{}null]"):
            assert takes(tokens, made, place.replace("{}", space))
            assert not takes(tokens, made, place.replace("{}", f"{space}{indent} "))
            assert not takes(tokens, made, place.replace("{}", space + "\n\n"))
    assert takes(tokens, made, "\n" * limits.MAX_SPACE_BEFORE + "[]")
    assert not takes(tokens, made, "\n" * (limits.MAX_SPACE_BEFORE + 1) + "[]")
    assert not takes(tokens, made, "[] ")


@pytest.mark.parametrize(
    ("kind", "text", "code", "said"),
    [
        ("json_schema", "{", "invalid_grammar", "the schema is no JSON"),
        ("json_schema", '{"a": NaN}', "invalid_grammar", "no JSON"),
        ("json_schema", "[]", "invalid_grammar", "neither an object nor true or false"),
        ("json_schema", "false", "invalid_grammar", "the schema is false"),
        ("json_schema", '{"x-guidance": {}}', "unsupported_grammar", "x-guidance, which is no keyword"),
        ("choice", "[]", "invalid_grammar", "at least one choice"),
        ("choice", '["a", ""]', "invalid_grammar", "none may be empty"),
        ("choice", '["a", 1]', "invalid_grammar", "no list of texts"),
        ("choice", '{"a": 1}', "invalid_grammar", "no list of texts"),
        ("choice", json.dumps(["a"] * 1025), "unsupported_grammar", "there are 1,025 choices; at most 1,024"),
        ("ebnf", "start: <|end|>", "unsupported_grammar", r"names a token of the vocabulary \(<...>\)"),
        ("ebnf", 'start: "a" <[0-5]>', "unsupported_grammar", "names a token"),
        ("ebnf", "start: <[*]>", "unsupported_grammar", "names a token"),
        ("ebnf", "start: @other", "unsupported_grammar", "refers to another one"),
        ("ebnf", 'start: X\nX: ~"a"', "unsupported_grammar", "uses ~"),
        ("ebnf", 'start: X\nX: /a/ & ~ /b/', "unsupported_grammar", "uses ~"),
        ("ebnf", '%llguidance {"allow_invalid_utf8": true}\nstart: "a"', "unsupported_grammar", "says %llguidance"),
        ("ebnf", 'start: %json {"type": "integer"}', "unsupported_grammar", "holds a JSON schema"),
        ("ebnf", 'start: %lark { start: "a" }', "unsupported_grammar", "says %lark"),
        ("ebnf", 'start: X\nX: %regex {"substring_chars": "ab"}', "unsupported_grammar", "says %regex"),
        ("ebnf", '%import .secret.X\nstart: X', "unsupported_grammar", "imports something other than common"),
        ("ebnf", '%import python.NAME\nstart: NAME', "unsupported_grammar", "imports something other"),
        ("ebnf", 'start: x\nx[max_tokens=3]: /a+/', "unsupported_grammar", "sets 'max_tokens' of a rule"),
        ("ebnf", 'start: x\nx[temperature=0.5]: /a+/', "unsupported_grammar", "sets 'temperature'"),
        ("ebnf", 'start: x\nx[stop=""]: /a+/', "unsupported_grammar", "sets 'stop'"),
        ("ebnf", 'start: "a', "invalid_grammar", "a string without an end"),
        ("ebnf", "start: /a", "invalid_grammar", "a regular expression without an end"),
        ("ebnf", 'root ::= other', "invalid_grammar", "uses 'other', for which it has no rule"),
        ("ebnf", 'root ::= "a', "invalid_grammar", "cannot be read"),
        ("ebnf", 'root ::= "\\q"', "invalid_grammar", "Invalid escape sequence"),
        ("ebnf", "root ::= " + "(" * 20_000, "unsupported_grammar", "nests too deeply"),
        ("choice", '["\\ud800"]', "invalid_grammar", "."),
        ("lark", 'start: "f" %json {"not": {}}', "unsupported_grammar", 'has \'not\'.*schema of a tool: {"not"'),
        ("lark", "start: %json " + "[" * 99 + "]" * 99, "unsupported_grammar", "has more than 64 .* of a tool"),
        ("lark", "start: %json " + "[" * 50_000, "unsupported_grammar", "nests too deeply"),
    ],
)  # fmt: skip
def test_what_is_refused(kind: Kind, text: str, code: str, said: str) -> None:
    with pytest.raises(GrammarRefused, match=said) as caught:
        composed(GrammarSource(kind, text, "p"), in_lark)
    assert caught.value.code == code
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("sneaked", [
    '"a" /* <|end|>', 'start: /a/b/ <|end|>',
    'start: /[/]/ <x>', 'start: "\\\\" <x> "\\""', 'start: "a" // "\n <x> //"',
    'start: /\\// <x>', "start: 'a' <x>", 'start: "a"i<x>', 'start: X\nX: "a"\n\n#"\n| <x>', 'start: /a/imsx <x>',
    'root ::= "a" "\\"" <x>', 'root ::= [\\]"] "x" <y>', 'root ::= "a\n<[1]>"', 'root ::= [a\n] "\n| <[1]> | "',
])  # fmt: skip
def test_nothing_hides_a_token_from_us_that_the_library_sees(tokens: LLTokenizer, sneaked: str) -> None:
    """Whatever it is, it is refused, or no control token may come of it."""
    try:
        made = matcher(tokens, "ebnf", sneaked)
    except (GrammarRefused, Refusal):
        return
    for _ in range(20):
        choices = [it for it in allowed(made.compute_bitmask()) if it != STOP]
        assert not any(tokens.is_special_token(it) for it in choices)
        if not choices or not made.consume_token(choices[0]):
            return
