"""The page, in Markdown, out of what the suites found. A figure whose check failed is not printed."""

import statistics
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.peers.goals import GOALS, Goal, outcome
from benchmarks.peers.load import Check, Sample, Taken
from benchmarks.peers.rounds import FOREIGN
from benchmarks.peers.suites import SUITES
from benchmarks.peers.summary import keys, ratios, units, values_of

FAILED = "failed check"
_COMPARED = ("tok/s", "tok/CPU s", "TTFT p50 ms", "ITL p50 ms", "ITL p99 ms", "s")  # ratios to peers are made of these


def page(head: Mapping[str, object], found: Mapping[str, Taken], absent: Mapping[str, str],
         pictures: Mapping[str, str]) -> str:  # fmt: skip
    """`pictures`: suite -> file beside the page."""
    parts = [
        f"# Heddle beside its peers, {head['date']}",
        _head(head),
        _systems(head, absent),
        goals_table(GOALS, found),
    ]
    for letter, taken in found.items():
        module = SUITES[letter]
        parts.append(f"## ({letter}) {module.TITLE}\n\n{(module.__doc__ or '').strip()}")
        if letter in pictures:
            parts.append(f"![{module.TITLE}]({pictures[letter]})")
        parts += [figures_table(taken), _ratios(taken), _floors(taken), checks_table(taken.checks), notes(taken)]
    return "\n\n".join(it for it in parts if it) + "\n"


def _head(head: Mapping[str, object]) -> str:
    took = head["took_s"]
    assert isinstance(took, Mapping)
    minutes = sum(took.values()) / 60
    return (
        f"`{head['command']}`, commit {head['commit']}, {minutes:.0f} minutes. {head['machine']};\n"
        f"{head['rounds']} rounds, every other one backwards. Figures are medians, in brackets the lowest and the\n"
        "highest round. A ratio is made within a round, of the same requests, and its median is over rounds. † marks\n"
        f"figures beside which other processes kept more than {FOREIGN} cores busy in at least one round.\n"
        f"`{FAILED}`: the answers were not those of Transformers with merged weights, so there is no figure.\n"
        "All systems compute in float32 on all cores, beside the client."
    )


def _systems(head: Mapping[str, object], absent: Mapping[str, str]) -> str:
    rows = ["| system | versions | settings |", "|---|---|---|"]
    versions, settings = head["versions"], head["settings"]
    assert isinstance(versions, Mapping) and isinstance(settings, Mapping)
    for name, told in settings.items():
        if name in absent:
            rows.append(f"| {name} | **did not run** | {cell(absent[name])} |")
        else:
            said = ", ".join(f"{package} {it}" for package, it in versions.get(name, {}).items())
            rows.append(f"| {name} | {said or 'not asked for'} | {cell(told)} |")
    return "\n".join(rows)


def goals_table(goals: Sequence[Goal], found: Mapping[str, Taken]) -> str:
    """Of what was run. Empty where none of it has a goal."""
    rows = ["## Goals", "", "| suite | goal | wanted | measured | |", "|---|---|---:|---:|---|"]
    for goal in goals:
        if goal.suite in found:
            told = outcome(goal, found[goal.suite].samples, found[goal.suite].checks)
            value = "–" if told.value is None else f"{told.value:.2f}" if goal.over else f"{told.value:.1f}"
            rows.append(f"| {goal.suite} | {goal.says} | {'≤' if goal.at_most else '≥'} {goal.bound:g} | {value} | "
                        f"{cell(told.verdict)} |")  # fmt: skip
    return "\n".join(rows) if len(rows) > 4 else ""


def figures_table(taken: Taken) -> str:
    shown = units(taken.samples)
    if not shown:
        return "Nothing was measured."
    rows = [
        f"| mode | system | rounds | {' | '.join(shown)} | foreign cores |",
        f"|---|---|--:|{'--:|' * len(shown)}--:|",
    ]
    for system, mode in keys(taken.samples):
        own = [it for it in taken.samples if (it.system, it.mode) == (system, mode)]
        mark = " †" if any(it.foreign > FOREIGN for it in own) else ""
        if not is_sound(taken.checks, system, mode):
            cells = [FAILED] + ["–"] * (len(shown) - 1)
        else:
            cells = [_spread(values_of(taken.samples, system, mode, unit).values(), mark) for unit in shown]
        foreign = statistics.median(it.foreign for it in own)
        rows.append(f"| {mode} | {system} | {len(own)} | {' | '.join(cells)} | {foreign:.2f} |")
    return "\n".join(rows)


def is_sound(checks: Sequence[Check], system: str, mode: str) -> bool:
    """Nobody checks what was only started."""
    own = [it for it in checks if (it.system, it.mode) == (system, mode)]
    return all(it.passed for it in own) and (bool(own) or mode == "started")


def _spread(values: Iterable[float], mark: str) -> str:
    numbers = list(values)
    if not numbers:
        return "–"
    middle = number(statistics.median(numbers)) + mark
    return middle if len(numbers) == 1 else f"{middle} ({number(min(numbers))}–{number(max(numbers))})"


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _ratios(taken: Taken) -> str:
    """Heddle over each peer in the same mode."""
    rows: list[tuple[str, str, list[str]]] = []
    for system, mode in keys(taken.samples):
        if system == "heddle" or not all(is_sound(taken.checks, it, mode) for it in (system, "heddle")):
            continue
        cells = [_ratio(taken.samples, system, mode, unit) for unit in _COMPARED]
        if any(cells):
            rows.append((mode, system, cells))
    shown = [index for index in range(len(_COMPARED)) if any(cells[index] for _, _, cells in rows)]
    if not shown:
        return ""
    head = [f"| mode | Heddle over | {' | '.join(_COMPARED[it] for it in shown)} |", f"|---|---|{'--:|' * len(shown)}"]
    return "\n".join(head + [f"| {mode} | {system} | {' | '.join(cells[it] or '–' for it in shown)} |"
                             for mode, system, cells in rows])  # fmt: skip


def _ratio(samples: Sequence[Sample], system: str, mode: str, unit: str) -> str:
    middle, low, high = ratios(samples, ("heddle", mode), (system, mode), unit)
    return "" if middle is None else f"{middle:.2f} ({low:.2f}–{high:.2f})"


def _floors(taken: Taken) -> str:
    if not taken.floors:
        return ""
    names = list(taken.floors[0])
    rows = [f"| {' | '.join(names)} |", f"|---|{'--:|' * (len(names) - 1)}"]
    rows += [
        f"| {' | '.join(it if isinstance(it, str) else number(it) for it in floor.values())} |"
        for floor in taken.floors
    ]
    return "The floor:\n\n" + "\n".join(rows)


def checks_table(checks: Sequence[Check]) -> str:
    if not checks:
        return ""
    rows = ["<details><summary>Checks of the answers</summary>", "",
            "| system | mode | | tokens read | the likeliest | largest gap | first that is not |",
            "|---|---|---|--:|--:|--:|---|"]  # fmt: skip
    for it in checks:
        share = "–" if it.share is None else f"{it.share:.4f}"
        rows.append(f"| {it.system} | {it.mode} | {'right' if it.passed else '**wrong**'} | {it.tokens} | {share} | "
                    f"{it.gap:.1e} | {cell(it.first or it.note)} |")  # fmt: skip
    return "\n".join([*rows, "", "</details>"])


def notes(taken: Taken) -> str:
    return "\n".join(f"- {cell(it)}" for it in dict.fromkeys(taken.notes))


def cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")
