"""What the clients' programs found: read from their results, written as Markdown."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

BEGIN, END = "<!-- clients:begin -->", "<!-- clients:end -->"
_LONGEST = 300  # characters of a reason


@dataclass(frozen=True)
class Check:
    """One thing that a client was used for. `problem`: why it failed, or None."""

    what: str
    problem: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Shown:
    """One client. `problem`: what kept its program from running to its end, such as a failed installation."""

    client: str
    program: str  # the file's name
    version: str
    checks: Sequence[Check] = ()
    problem: str | None = None

    @property
    def problems(self) -> list[str]:
        own = [] if self.problem is None else [self.problem]
        return own + [f"{it.what}: {it.problem}" for it in self.checks if it.problem is not None]

    @property
    def result(self) -> str:
        """In a few words, with the reasons."""
        good = sum(it.problem is None for it in self.checks)
        told = f"{good} of {len(self.checks)}" if self.checks else "nothing ran"
        return f"all {good}" if self.checks and not self.problems else "; ".join([f"**{told}**", *self.problems])


def read(results: Path, client: str, program: str, problem: str | None = None) -> Shown:
    """Of a results file, as far as it was written. `problem`: what is known of how the program ended."""
    version, ended, checks = "unknown", False, []
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    for line in lines:
        try:
            told = json.loads(line)
        except ValueError:  # the program was killed while it wrote
            break
        version, ended = told.get("version", version), told.get("ended", ended)
        if "what" in told:
            checks.append(Check(told["what"], told["problem"], told["seconds"]))
    if problem is None and not ended:
        problem = "the program did not come to its end"
    if problem is None and not checks:
        problem = "the program has no checks"
    return Shown(client, program, version, checks, problem)


def summary(shown: Sequence[Shown]) -> str:
    """A row a client."""
    rows = [f"| [{it.client}](clients/programs/{it.program}) | {it.version} | {_cell(it.result)} |" for it in shown]
    return "\n".join(["| client | version | checks that passed |", "|---|---|---|", *rows])


def whole(shown: Sequence[Shown]) -> str:
    """A row a check."""
    sections = []
    for it in shown:
        rows = [
            f"| {_cell(check.what)} | {_cell(check.problem or 'yes')} | {check.seconds:.1f} |" for check in it.checks
        ]
        problem = f"{_short(it.problem)}\n\n" if it.problem else ""
        table = "\n".join(["| What | Worked | Seconds |", "|---|---|---:|", *rows])
        sections.append(f"## {it.client} {it.version}\n\n{problem}{table}\n")
    return "\n".join(sections)


def put(page: Path, text: str) -> None:
    """Replaces what stands between the markers. Raises ValueError where they are missing."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} has no {BEGIN} … {END}")
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _LONGEST else f"{flat[:_LONGEST]}…"


def _cell(text: str) -> str:
    """One line, and no bar that would end the cell."""
    flat = " ".join(text.split())
    return flat.replace("|", "\\|")
