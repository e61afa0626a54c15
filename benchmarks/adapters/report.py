"""The page, in Markdown. A figure beside which something was wrong is not printed."""

from collections.abc import Mapping, Sequence
from types import ModuleType

from benchmarks.adapters.found import Found, Row
from benchmarks.adapters.goals import GOALS
from benchmarks.peers.report import FAILED, cell, checks_table, figures_table, goals_table, notes, number
from benchmarks.peers.rounds import FOREIGN


def page(head: Mapping[str, object], found: Mapping[str, Found], sections: Mapping[str, ModuleType],
         files: Mapping[str, str]) -> str:  # fmt: skip
    """`files`: picture -> its file beside the page."""
    parts = [f"# Adapters that come and go, {head['date']}", _head(head), goals_table(GOALS, found)]
    for name, its in found.items():
        module = sections[name]
        parts.append(f"## {module.TITLE}\n\n{(module.__doc__ or '').strip()}")
        parts += [f"![{module.TITLE}]({files[picture]})" for picture in its.pictures if picture in files]
        parts += [f"{title}:\n\n{table(rows)}" for title, rows in its.tables.items() if rows]
        parts += [figures_table(its), checks_table(its.checks), notes(its)]
    return "\n\n".join(it for it in parts if it) + "\n"


def table(rows: Sequence[Row]) -> str:
    """Rows have the same columns, words on the left."""
    names = list(rows[0])
    sides = ["---" if isinstance(rows[0][it], str) else "--:" for it in names]
    lines = [[cell(it) if isinstance(it, str) else number(it) for it in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(it)} |" for it in (names, sides, *lines))


def _head(head: Mapping[str, object]) -> str:
    took, versions = head["took_s"], head["versions"]
    assert isinstance(took, Mapping) and isinstance(versions, Mapping)
    quick = "**A smoke run: its figures mean nothing.** " if head["quick"] else ""
    return (
        f"{quick}`{head['command']}`, commit {head['commit']}, {sum(took.values()) / 60:.0f} minutes.\n"
        f"{head['machine']}; Python {head['python']}, {', '.join(f'{name} {it}' for name, it in versions.items())}; "
        f"{head['threads']} threads, beside the client.\n"
        f"{head['rounds']} rounds, every other one backwards. Figures are medians, in brackets the lowest and the\n"
        "highest round; ratios are made within a round. † marks figures beside which other processes kept more than "
        f"{FOREIGN} cores\nbusy in at least one round. "
        f"`{FAILED}`: an answer was wrong, or an account, so there is no figure.\n"
        "Answers are right where Transformers with merged weights says so, and where they are what the same adapter\n"
        "answers when nothing else goes on."
    )
