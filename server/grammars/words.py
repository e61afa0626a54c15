"""What the library says of a grammar that it refuses, in words for clients: what it is about, and what would help.

It tells an error by its text alone, and gives each the same reason to stop, so it is by its text that we know it. Texts
that are not known here are passed on, without what they say of places in grammars of ours.
"""

import re
from typing import NamedTuple

from server.grammars.limits import MOST_SECONDS_A_TOKEN
from server.grammars.refused import Code, GrammarRefused, shown
from server.grammars.source import Kind

TOO_SLOW = (
    f"following the grammar takes more than {MOST_SECONDS_A_TOKEN:g} s for one token at this point of the answer, "
    "since there are many ways to read it; write it so that there is one"
)
MOST_SAID = 200  # characters
NOTHING_FOLLOWS = "NoExtensionBias"
_WHAT: dict[Kind, str] = {
    "json_schema": "the schema",
    "regex": "the regular expression",
    "choice": "the list of choices",
    "ebnf": "the grammar",
    "lark": "the grammar of the tools",
}
_PLACE = re.compile(r"(?:at )?(?P<line>[0-9]+)\((?P<column>[0-9]+)\): ")
_OF_SCHEMA = "failed to compile JSON schema: "
_IN_REGEX = re.compile(r"^regex parse error|\(in regex\)|^lookarounds")
_READ_AS = "it is read as GBNF if a line begins with `root ::=`, and otherwise as Lark, which needs a rule `start:`"
_LESS = "fewer alternatives, smaller bounds of repetitions and less nesting need less"
_UNPRINTABLE = re.compile(r"[^\x20-\x7e\u00a1-\ud7ff\ue000-\ufffd]+")
_SYNTAX = re.compile(r"Expected token|expecting rule|lexer error|[Uu]nexpected")


class _Saying(NamedTuple):
    """`words`: with {what} for what is refused, and {0}, {1} for what the library names."""

    pattern: re.Pattern[str]
    words: str
    code: Code


def _saying(pattern: str, words: str, code: Code = "unsupported_grammar") -> _Saying:
    return _Saying(re.compile(pattern), words, code)


_SAYINGS = (
    # -- schemas
    _saying(r"oneOf constraints are not supported",
            "{what} has 'oneOf' with cases that may both be meant, which is not served; use 'anyOf', or tell the cases "
            "apart by a required property with a 'const' of its own"),
    _saying(r"^Unsatisfiable schema: anyOf is empty", "nothing can follow {what}: an 'anyOf' or 'enum' is empty",
            "invalid_grammar"),
    _saying(r"^Unsatisfiable schema: (.*)", "nothing can follow {what}: {0}", "invalid_grammar"),
    _saying(r"^Unimplemented keys: (.*)", "{what} has {0}, which is not served; leave it out"),
    _saying(r"patternProperty regexes (.*) are not disjoint",
            "{what} has 'patternProperties' of which two may mean the same name ({0}), which is not served; write "
            "patterns that exclude one another"),
    _saying(r"^min/maxProperties only supported",
            "{what} has 'minProperties' or 'maxProperties' beside properties that are not required, which is not "
            "served; leave it out, or use anyOf with the cases written out"),
    _saying(r"^invalid multiple of", "{what} has a 'multipleOf' that is not above 0", "invalid_grammar"),
    _saying(r"^Expected f64 for '(.*?)', got (.*)", "{what} has {0!r} {1}, which is no number", "invalid_grammar"),
    _saying(r"float range|too many digits",
            "{what} has a bound or a 'multipleOf' that is not served: it must fit into 64 bits, with few digits"),
    _saying(r"^circular references with sibling keys",
            "{what} has a '$ref' that leads to itself beside other keywords, which is not served; put them where it "
            "leads"),
    # -- regular expressions
    _saying(r"look-around",
            "{what} has look-around ((?=...) and the like), which is not served; write what may come instead"),
    _saying(r"^lookarounds not supported yet",
            r"{what} has \b, or ^ or $ in its midst, which is not served; it is matched as a whole in any case"),
    _saying(r"^backreferences", r"{what} has a back-reference (\1 and the like), which is not served; write it out"),
    # -- grammars
    _saying(r"no start rule found", "{what} has no rule to start with: " + _READ_AS, "invalid_grammar"),
    _saying(r'^unknown name: "(.*?)"', "{what} uses {0!r}, for which it has no rule", "invalid_grammar"),
    _saying(rf"^{NOTHING_FOLLOWS}",
            "nothing can follow {what}: no text comes to an end in it, such as with a rule that always needs itself",
            "invalid_grammar"),
    # -- what is too much
    _saying(r"too (?:big|large|many|complex|deep)|fuel|exceeded", "{what} is too large when compiled ({0}); " + _LESS),
)  # fmt: skip
# of texts that nobody has met: such words are for what is right, and not served
_UNSERVED = re.compile(r"not (?:yet )?(?:supported|implemented)|unsupported|unimplemented|limit", re.IGNORECASE)


def refusal(error: str, kind: Kind, has_its_places: bool = False) -> GrammarRefused:
    """`kind`: of what is refused. `has_its_places`: whether lines and columns are those of the client's text."""
    text = plain(error)
    what, place = _WHAT[kind], _PLACE.match(text)
    if place is not None:
        text = text[place.end() :]
    if text.startswith(_OF_SCHEMA):
        text, what = text.removeprefix(_OF_SCHEMA), "the schema of a tool" if kind == "lark" else "the schema"
    elif kind == "json_schema" and _IN_REGEX.search(error):
        what = "a pattern of the schema"
    for it in _SAYINGS:
        match = it.pattern.search(text)
        if match is not None:
            return GrammarRefused(it.words.format(*map(_cut, match.groups() or (text,)), what=what), it.code)
    where = f", line {place['line']}, column {place['column']}" if place is not None and has_its_places else ""
    help_of_it = f"; {_READ_AS}" if kind == "ebnf" and _SYNTAX.search(text) else ""
    code: Code = "unsupported_grammar" if _UNSERVED.search(text) else "invalid_grammar"
    return GrammarRefused(f"{what} is refused{where}: {_cut(text)}{help_of_it}", code)


def at_a_token(error: str) -> str:
    """Of a grammar that went well until then."""
    text = plain(error)
    if text.startswith(NOTHING_FOLLOWS):
        return "nothing can follow at this point of the answer: the grammar leads where no text comes to an end"
    return f"the grammar is too much at this point of the answer: {_cut(text)}"


def plain(error: str) -> str:
    """Without the grammar around the place and without control characters."""
    _, is_of_regex, of_regex = error.rpartition("\nerror: ")
    first = (of_regex if is_of_regex else error).partition("\n")[0]
    return _UNPRINTABLE.sub(" ", first.rpartition("(in regex): ")[2]).strip()


def _cut(text: str) -> str:
    return text if len(text) <= MOST_SAID else text[: MOST_SAID - 1] + "…"


def of_reader(error: str) -> GrammarRefused:
    """Of GBNF that cannot be read."""
    missing = re.match(r"Rule '(.*?)' not found", error)
    if missing is not None:
        return GrammarRefused(f"the grammar uses {shown(missing[1])!r}, for which it has no rule", "invalid_grammar")
    if "recursion" in error:
        return GrammarRefused("the grammar nests too deeply; less nesting is served")
    return GrammarRefused(
        f"the grammar cannot be read as GBNF, which it is by its rule `root ::=`: {shown(error)}", "invalid_grammar"
    )
