"""How large and how deep JSON is, before anything is built of it: whatever is sent takes milliseconds."""

import re

from server.grammars.limits import MAX_COMMAS, MAX_CONTAINERS, MAX_DEPTH
from server.grammars.refused import GrammarRefused

# possessive, and an unfinished string ends with the text: linear whatever is sent
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_OTHERS = re.compile(r"[^\[\]{}]++")


def check_structure(text: str, what: str) -> None:
    """`what`: how it is called in messages. Raises GrammarRefused."""
    bare = _STRING.sub("", text)
    num_commas = bare.count(",")
    if num_commas > MAX_COMMAS:
        raise GrammarRefused(
            f"{what} has {num_commas:,} commas outside of its strings; at most {MAX_COMMAS:,} are served"
        )
    num_containers = bare.count("[") + bare.count("{")
    if num_containers > MAX_CONTAINERS:
        raise GrammarRefused(f"{what} has {num_containers:,} lists and objects; at most {MAX_CONTAINERS:,} are served")
    depth = 0
    for bracket in _OTHERS.sub("", bare):
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_DEPTH:
            raise GrammarRefused(f"{what} has more than {MAX_DEPTH} lists and objects inside one another")
