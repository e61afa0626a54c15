"""GBNF, as llama.cpp has it, in Lark. Imported in the compiling process only: hostile text may take long."""

import re

from llguidance.gbnf_to_lark import gbnf_to_lark

from server.grammars import words

_ROOT = re.compile(r"^[ \t]*+root[ \t]*+::=", re.MULTILINE)
_OPTIONS = "%llguidance {}"
# a string or a comment, in which nothing is a class, or a class
_CLASS = re.compile(r'"(?:[^"\\\n]|\\.)*+"|#[^\n]*+|\[(?:[^\]\\\n]|\\.)++\]')
_OF_RUST = re.compile(r"([&~])(?=\1)|(?<=-)(-)|(?<!^)(\[)")


def _plain(found: re.Match[str]) -> str:
    """A class in which nothing means more to Rust than to GBNF: && -- ~~ and [ are letters."""
    text = found.group()
    return text if text[0] != "[" else "[" + _OF_RUST.sub(lambda it: f"\\x{ord(it[0]):02x}", text[1:])


def is_gbnf(text: str) -> bool:
    return _ROOT.search(text) is not None


def in_lark(text: str) -> str:
    """Raises GrammarRefused."""
    if not is_gbnf(text):
        return text
    try:
        lark = gbnf_to_lark(_CLASS.sub(_plain, text))
    except Exception as error:  # the library raises no narrower type for rules that are missing
        raise words.of_reader(str(error)) from None
    return lark.removeprefix(_OPTIONS)
