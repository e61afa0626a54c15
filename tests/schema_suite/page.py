"""The tables in docs/structured-output.md."""

from collections import Counter
from collections.abc import Mapping

from tests.schema_suite.measure import Column

BEGIN, END = "<!-- begin: python -m tests.schema_suite -->", "<!-- end -->"
_TITLES = {"draft2020-12": "2020-12", "draft7": "draft 7"}


def tables(columns: Mapping[str, Column]) -> str:
    names = [it for it in _TITLES if it in columns]
    head = f"| | {' | '.join(_TITLES[it] for it in names)} |\n|---|{'--:|' * len(names)}\n"
    found = [columns[it] for it in names]
    lines = [
        _line("schemas", [it.schemas for it in found]),
        _line("served", [it.served for it in found]),
        _line("refused", [sum(it.refused.values()) for it in found]),
        _line("instances of those that are served, judged as the suite does", [it.right for it in found]),
        _line("valid, and not taken", [sum(it.too_narrow.values()) for it in found]),
        _line("not valid, and taken", [sum(it.too_wide.values()) for it in found]),
        _line("of formats that are not enforced", [it.annotated for it in found]),
    ]
    parts = [head + "".join(lines)]
    for title, counters in (
        ("Refused", [it.refused for it in found]),
        ("Valid, and not taken", [it.too_narrow for it in found]),
        ("Not valid, and taken", [it.too_wide for it in found]),
    ):
        total: Counter[str] = sum(counters, Counter())
        rows = [_line(reason, [it[reason] for it in counters]) for reason, _ in total.most_common()]
        parts.append(head.replace("| |", f"| {title} |", 1) + "".join(rows))
    return "\n".join(parts)


def rewritten(page: str, columns: Mapping[str, Column]) -> str:
    before, _, rest = page.partition(BEGIN)
    _, _, behind = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables(columns)}\n{END}{behind}"


def _line(title: str, numbers: list[int]) -> str:
    return f"| {title} | {' | '.join(f'{it:,}' for it in numbers)} |\n"
