"""References within a JSON Schema."""

import re
from collections.abc import Sequence, Set
from typing import Any
from urllib.parse import unquote

from server.grammars.refused import GrammarRefused, shown

_LOCAL = re.compile(r"#(/.*)?", re.DOTALL)


def check_local(reference: str) -> None:
    """Raises GrammarRefused."""
    if _LOCAL.fullmatch(reference) is None:
        raise GrammarRefused(
            f"the schema refers to {shown(reference)!r}; only references within it (#/$defs/...) are served, and "
            "nothing is fetched"
        )


def check_ends(schema: dict[str, Any], references: Sequence[str], walked: Set[int]) -> None:
    """No reference leads to itself by references alone, which nothing would follow, and each leads to a schema that was
    `walked` (by id), and not to what stands in the place of no schema. Raises GrammarRefused."""
    ends: set[str] = set()  # those of which it is known
    for first in references:
        chain: dict[str, None] = {}
        reference: str | None = first
        while reference is not None and reference not in ends:
            if reference in chain:
                raise GrammarRefused(f"the reference {shown(reference)!r} leads to itself", "invalid_grammar")
            chain[reference] = None
            it = _meant(schema, reference)
            if not isinstance(it, bool) and id(it) not in walked:
                raise GrammarRefused(f"the reference {shown(reference)!r} leads to no schema", "invalid_grammar")
            following = it.get("$ref") if isinstance(it, dict) else None
            reference = following if isinstance(following, str) else None
        ends |= chain.keys()


def _meant(schema: dict[str, Any], reference: str) -> Any:
    it: Any = schema
    for part in reference[2:].split("/") if reference != "#" else ():
        name = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(it, list):
            it = it[int(name)] if name.isdecimal() and len(name) < 6 and int(name) < len(it) else None
        else:
            it = it.get(name) if isinstance(it, dict) else None
    return it
