"""Plain text and JSON on standard output. What strangers wrote is cleaned before a terminal sees it."""

import json
from collections.abc import Iterable, Sequence

from adapters_store.errors import clean

_MAX_CELL_BYTES = 400


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    lines = [list(header), *([clean(str(cell), _MAX_CELL_BYTES) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def print_json(value: object) -> None:
    """One value. In ASCII: every other character is an escape, which no terminal obeys."""
    print(json.dumps(value, indent=2))


def print_json_array(values: Iterable[object]) -> None:
    """The same of values that need not be in memory all at once."""
    opening = "["
    for value in values:
        print(f"{opening}\n  {json.dumps(value)}", end="")
        opening = ","
    print("[]" if opening == "[" else "\n]")


def megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.2f} MB"
