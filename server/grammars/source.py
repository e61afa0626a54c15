"""A grammar as a request words it, before it is compiled."""

from typing import Literal

import msgspec

# JSON Schema; a regular expression; a list of texts, one of which it is (JSON); GBNF or Lark; Lark as llguidance has it
Kind = Literal["json_schema", "regex", "choice", "ebnf", "lark"]


class GrammarSource(msgspec.Struct, frozen=True):
    """`param`: the request's field that it came in, for what is said of it. `before`: what may come before it, as an
    expression in Lark (a model's reasoning, for instance), `opening`: what it begins with there (the name of a
    channel), and `instead`: what may stand in their place, as a grammar in Lark (calls of tools). These are ours, and
    never a client's."""

    kind: Kind
    text: str
    param: str
    before: str = ""
    opening: str = ""
    instead: str = ""
