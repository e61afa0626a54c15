"""Pictures of a suite: bars of one unit, a row for each mode and system, with the rounds' spread."""

import statistics
from collections.abc import Sequence

from benchmarks.peers.load import Check, Sample
from benchmarks.peers.report import is_sound
from benchmarks.peers.summary import keys, values_of
from docs.pictures.drawing import Picture

PLOTTED = {"a": "tok/s", "b": "tok/s", "c": "tok/s", "d": "tok/s", "e": "ITL p99 ms", "f": "tok/s", "h": "s"}
_LEFT, _RIGHT, _ROW, _TOP, _GAP = 330, 780, 21, 62, 12


def bars(title: str, unit: str, samples: Sequence[Sample], checks: Sequence[Check]) -> str:
    """SVG; empty where nothing has that unit."""
    rows = [(mode, system, list(values_of(samples, system, mode, unit).values())) for system, mode in keys(samples)]
    rows = [it for it in rows if it[2]]
    if not rows:
        return ""
    modes = len({mode for mode, _, _ in rows})
    sound = [max(values) for mode, system, values in rows if is_sound(checks, system, mode)]
    most = max(sound, default=1.0)
    picture = Picture(_TOP + _ROW * len(rows) + _GAP * modes + 14, title, f"{unit} of each system, by mode")
    picture.text(24, 30, title, "bold", 16)
    picture.text(24, 48, f"{unit}: median of the rounds; the line goes from the lowest to the highest", "dim", 12)
    y, last = float(_TOP), ""
    for mode, system, values in rows:
        if mode != last:
            y += _GAP
            picture.text(24, y + 13, mode, "", 12)
        last = mode
        picture.text(_LEFT - 10, y + 13, system, "bold" if system == "heddle" else "dim", 12, "end")
        if not is_sound(checks, system, mode):
            picture.text(_LEFT + 4, y + 13, "failed check", "dim", 12)
            y += _ROW
            continue
        middle = statistics.median(values)
        scale = (_RIGHT - _LEFT) / most
        picture.box("one" if system == "heddle" else "base", _LEFT, y + 1, max(1.0, middle * scale), _ROW - 6, radius=2)
        if len(values) > 1:
            at = y + 1 + (_ROW - 6) / 2
            picture.line("line", (_LEFT + min(values) * scale, at), (_LEFT + max(values) * scale, at))
        picture.text(
            _LEFT + max(values) * scale + 6, y + 13, f"{middle:,.0f}" if middle >= 100 else f"{middle:.1f}", "", 12
        )
        y += _ROW
    return picture.svg()
