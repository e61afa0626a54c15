"""Patterns of JSON Schema, which are JavaScript's regular expressions, as the library's (Rust's) that mean the same."""

import re

from server.grammars.refused import GrammarRefused, shown

_PIECE = re.compile(
    r"\\(?P<escape>.)|(?P<begin>\[\^?)|(?P<end>\])|(?P<dot>\.)|(?P<set>[&~\-])(?P=set)|(?P<group>\(\?[^:=!<])",
    re.DOTALL,
)
_SPACE = r"\t\n\x0b\x0c\r\x20\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"
_ANY = r"[^\n\r\u2028\u2029]"
_MEANT_ALIKE = frozenset("dDwWnrtfvpPuxbBk0123456789c")


def in_rust(pattern: str) -> str:
    """Raises GrammarRefused where the two differ in a way that is not mended here."""
    pieces: list[str] = []
    place, is_in_class, class_begin = 0, False, -1
    for match in _PIECE.finditer(pattern):
        pieces.append(pattern[place : match.start()])
        place = match.end()
        pieces.append(_piece(match, pattern, is_in_class, class_begin))
        if match["begin"] and not is_in_class:
            is_in_class, class_begin = True, match.end()
        elif match["end"] and is_in_class:
            is_in_class = False
    return "".join([*pieces, pattern[place:]])


def _piece(match: re.Match[str], pattern: str, is_in_class: bool, class_begin: int) -> str:
    found = match.group()
    if match["escape"]:
        return _escape(match["escape"], pattern, is_in_class)
    if match["dot"]:
        return found if is_in_class else _ANY
    if match["begin"] and is_in_class:  # a bracket of which Rust would make a class inside the class
        return "\\" + found
    if match["end"] and is_in_class and match.start() == class_begin:
        raise _differs("an empty class ([] or [^])", pattern)
    if match["set"] and is_in_class:
        if match["set"] == "-":
            raise _differs("-- inside a class", pattern)
        return f"\\{match['set']}" * 2
    if match["group"] and not is_in_class:
        raise _differs(f"{match['group']}", pattern)
    return found


def _escape(letter: str, pattern: str, is_in_class: bool) -> str:
    if letter == "s":
        return _SPACE if is_in_class else f"[{_SPACE}]"
    if letter == "S":
        if is_in_class:
            raise _differs(r"\S inside a class", pattern)
        return f"[^{_SPACE}]"
    if letter.isascii() and letter.isalnum() and letter not in _MEANT_ALIKE:
        raise _differs(f"\\{letter}", pattern)
    return f"\\{letter}"


def _differs(what: str, pattern: str) -> GrammarRefused:
    return GrammarRefused(
        f"the pattern {shown(pattern)!r} has {shown(what)}, which is not served; write it another way"
    )
