"""What a section of the page holds, and how a figure is taken beside other work."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import psutil

from benchmarks.peers.load import Check, Taken
from benchmarks.peers.report import is_sound
from benchmarks.peers.rounds import FOREIGN
from benchmarks.peers.summary import ratios
from benchmarks.served import OtherWork

HEDDLE = "heddle"  # the only system here
T = TypeVar("T")
Row = Mapping[str, float | str]


@dataclass
class Found(Taken):
    """`tables`: what was computed or read off samples, by title. `pictures`: SVG, by the end of its file's name."""

    tables: dict[str, list[Row]] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)


def quietly(act: Callable[[], T], repeats: int) -> tuple[T, float]:
    """What `act` returns, and how many cores other processes kept busy meanwhile. Where those are more than FOREIGN it
    is done again, and the quietest one counts."""
    best: tuple[T, float] | None = None
    for _ in range(1 + repeats):
        with OtherWork() as others:
            found = act()
        foreign = round(others.share * (psutil.cpu_count() or 1), 2)
        if best is None or foreign < best[1]:
            best = found, foreign
        if foreign <= FOREIGN:
            break
    assert best is not None
    return best


def all_right(mode: str, wrong: list[str], asked: int) -> Check:
    """That nothing was wrong among so many; nothing asked is nothing shown."""
    return Check(HEDDLE, mode, not wrong and asked > 0, tokens=asked, first=wrong[0] if wrong else "",
                 note=f"{asked} answers as when nothing else went on")  # fmt: skip


def spread(middle: float | None, low: float, high: float) -> str:
    """A ratio of rounds, as the page has it."""
    return "–" if middle is None else f"{middle:.2f} ({low:.2f}–{high:.2f})"


def over(found: Found, first: str, modes: Sequence[str], units: Sequence[str]) -> list[Row]:
    """Medians of the rounds' ratios, lowest and highest; none where an answer was wrong."""
    rows: list[Row] = []
    for mode in modes:
        if is_sound(found.checks, HEDDLE, mode) and is_sound(found.checks, HEDDLE, first):
            rows.append({"beside": mode} | {unit: spread(*ratios(found.samples, (HEDDLE, mode), (HEDDLE, first), unit))
                                            for unit in units})  # fmt: skip
    return rows
