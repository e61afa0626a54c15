"""The page: counts, tables and messages, all of them from the cells."""

import re
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from tests.census.families import FAMILIES
from tests.census.made import Section
from tests.census.measure import RESULTS, Cell

BEGIN, END = "<!-- begin: python -m tests.census -->", "<!-- end -->"
ABOUT = f"""# Which adapters are served

Every cell below was measured, on tiny random models of each family in float32 on a CPU: an adapter is made by PEFT, or
written by hand in a form that other tools write; it is verified as a server verifies it; if it is accepted, five
prompts are decoded with it beside the same five for the base. What is right is computed by PEFT and `generate`, or,
where PEFT does not read the form, by `generate` on weights that were merged by hand.

This page is written by `make census`; do not edit it between the markers.

{BEGIN}
{END}
"""
SHORT = {"exact": "exact", "refused": "ref", "WRONG": "**WRONG**", "failed": "**failed**", "vacuous": "*vacuous*",
         "unjudged": "*unjudged*", "PEFT cannot": "peft✗", "n/a": "–"}  # fmt: skip
KEY = """exact: accepted, and greedy tokens are the reference's, which differ from the base's. ref: refused; the number
is the message's below. **WRONG**: accepted, and other tokens. **failed**: accepted, then not served. *vacuous*: exact,
but the reference answers as the base does. *unjudged*: accepted, but PEFT does not load it. peft✗: PEFT does not make
it. –: the family has nothing of the kind, or was not asked."""
# a refusal says what to do if one of its clauses begins with one of these
_VERBS = (
    "build|convert|export|give|keep|list|merge|move|name|put|raise|remove|rename|repair|save|send|serve|set|split|start|"
    "train|tune|turn|use|write"
)
_REMEDY = re.compile(rf"(?:[:;,.]|\bor|\bthen|\()\s+(?:To do: )?(?:if [^:;]*, )?(?:{_VERBS})\b")


def names_remedy(message: str) -> bool:
    return bool(_REMEDY.search(message))


def shortened(message: str) -> str:
    """Of several problems the first, and everything that is to do."""
    first, *todo = message.split(". To do: ")
    if re.match(r"(?:all )?\d+ (?:of the adapter's )?tensors", first):
        problem, _, others = first.partition("; ")
        first = f"{problem}; …" if others else problem
    return ". To do: ".join([first, *todo])


def pattern_of(message: str) -> str:
    """The message without what differs from adapter to adapter: names of tensors and modules, shapes, numbers."""
    without = re.sub(r"\[[\d, ]*\]", "[…]", shortened(message).removesuffix("; …"))
    without = re.sub(r"'(?:\w+-\d+(?:-origin)?)'", "'…'", without)
    without = re.sub(r"\b\w+(?:\.\w+){2,}(?:\.…)?", "…", without)
    return re.sub(r"\b\d[\d.,]*\b", "N", without).replace("; …", "")


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("peft", "transformers", "torch")}


def counts(cells: Sequence[Cell]) -> dict[str, int]:
    counted = Counter(cell.result for cell in cells)
    return {result: counted[result] for result in RESULTS if counted[result]}


def summary(sections: Sequence[Section], cells: Sequence[Cell]) -> str:
    """The counts, as a table; that none is wrong is said too."""
    shown = [result for result in RESULTS if result == "WRONG" or any(cell.result == result for cell in cells)]
    lines = [f"| | {' | '.join(shown)} |", f"|---|{'---:|' * len(shown)}"]
    for title, key in [*((section.title, section.key) for section in sections), ("**in all**", None)]:
        counted = counts([cell for cell in cells if key in (None, cell.section)])
        lines.append(f"| {title} | {' | '.join(str(counted.get(result, 0)) for result in shown)} |")
    return "\n".join(lines)


def write(sections: Sequence[Section], cells: Sequence[Cell]) -> str:
    refusals = _refusals(cells)
    told = ", ".join(f"{name} {number}" for name, number in versions().items())
    parts = [f"Measured with {told}.", "", summary(sections, cells), "", KEY]
    for section in sections:
        parts += ["", f"## {section.title}", "", _table(section, cells, refusals)]
    parts += ["", *_messages(cells, refusals)]
    return "\n".join(parts)


def save(file: Path, text: str) -> None:
    """Between the markers; a page that is not there yet is begun."""
    before, _, rest = (file.read_text() if file.exists() else ABOUT).partition(BEGIN)
    file.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}")


def _refusals(cells: Sequence[Cell]) -> dict[str, int]:
    """Kinds of messages, numbered as they come."""
    kinds: dict[str, int] = {}
    for cell in cells:
        if cell.result == "refused":
            kinds.setdefault(pattern_of(cell.message), len(kinds) + 1)
    return kinds


def _table(section: Section, cells: Sequence[Cell], refusals: dict[str, int]) -> str:
    ours = {(cell.row, cell.family): cell for cell in cells if cell.section == section.key}
    families = [
        name for name in FAMILIES if any(cell.family == name and cell.result != "n/a" for cell in ours.values())
    ]
    lines = [f"| adapter | {' | '.join(families)} | messages |", f"|---|{'---|' * (len(families) + 1)}"]
    for name in dict.fromkeys(row for row, _ in ours):
        row = [ours[name, family] for family in families]
        numbers = sorted({refusals[pattern_of(cell.message)] for cell in row if cell.result == "refused"})
        told = ", ".join(map(str, numbers))
        lines.append(f"| {_cell(name)} | {' | '.join(SHORT[cell.result] for cell in row)} | {told} |")
    return "\n".join(lines)


def _messages(cells: Sequence[Cell], refusals: dict[str, int]) -> list[str]:
    lines = ["## Messages", "", "One of each kind. \"To do\" is whether a clause of it says what to do.", "",
             "| | refusal | cells | adapters | to do? |", "|---:|---|---:|---|---|"]  # fmt: skip
    for kind, number in refusals.items():
        of_kind = [cell for cell in cells if cell.result == "refused" and pattern_of(cell.message) == kind]
        rows = "; ".join(dict.fromkeys(cell.row for cell in of_kind))
        todo = "yes" if all(names_remedy(cell.message) for cell in of_kind) else "**no**"
        lines.append(f"| {number} | {_cell(shortened(of_kind[0].message))} | {len(of_kind)} | {_cell(rows)} | {todo} |")
    for result, title in (("WRONG", "Served wrongly"), ("failed", "Accepted, then not served"),
                          ("unjudged", "Accepted, without a reference"), ("vacuous", "Shows nothing"),
                          ("PEFT cannot", "What PEFT does not make")):  # fmt: skip
        by_message: dict[tuple[str, str], list[str]] = {}
        for cell in cells:
            if cell.result == result:
                by_message.setdefault((cell.row, cell.message), []).append(cell.family)
        if by_message:
            lines += ["", f"### {title}", "", "| adapter | families | |", "|---|---|---|"]
            lines += [f"| {_cell(row)} | {', '.join(families)} | {_cell(message)} |"
                      for (row, message), families in by_message.items()]  # fmt: skip
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
