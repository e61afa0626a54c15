"""What the front asks the compiling process, and what it answers."""

import msgspec

from server.grammars.refused import Code
from server.grammars.source import GrammarSource
from server.grammars.vocabulary_spec import VocabularySpec


class Compile(msgspec.Struct, frozen=True, tag=True):
    """`cpu_seconds`: what the process may spend on it at most."""

    source: GrammarSource
    cpu_seconds: int


class Told(msgspec.Struct, frozen=True, tag=True):
    """The vocabulary is loaded."""


class Compiled(msgspec.Struct, frozen=True, tag=True):
    grammar: str


class Refused(msgspec.Struct, frozen=True, tag=True):
    message: str
    code: Code
    is_of_tools: bool = False


Job = VocabularySpec | Compile
Answer = Told | Compiled | Refused
