"""A picture of a figure against adapters per room: a line for each way to ask, a point for the median of the rounds."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.adapters.found import HEDDLE, Found
from benchmarks.peers.report import is_sound
from benchmarks.peers.summary import values_of
from docs.pictures.drawing import WIDTH, Picture

_LEFT, _RIGHT, _TOP, _BOTTOM = 76, WIDTH - 150, 76, 340
_KINDS = ("line-one", "line-one", "line-two", "line-two")  # a colour a popularity; p50 and p99 of it are dashed and not


class Line(NamedTuple):
    """`points`: of each ratio its rounds' figures; empty where a check failed."""

    name: str
    points: list[list[float]]


def line(found: Found, name: str, modes: Sequence[str], unit: str) -> Line:
    return Line(name, [list(values_of(found.samples, HEDDLE, mode, unit).values())
                       if is_sound(found.checks, HEDDLE, mode) else [] for mode in modes])  # fmt: skip


def draw(title: str, lines: Sequence[Line], ratios: Sequence[int]) -> str:
    """SVG; empty where there is nothing to draw."""
    values = [value for it in lines for point in it.points for value in point]
    if not values:
        return ""
    picture = Picture(_BOTTOM + 70, title, f"{title}, in milliseconds, at {', '.join(f'{it}x' for it in ratios)}")
    picture.text(24, 32, title, "bold", 16)
    picture.text(24, 52, "ms; points are medians of the rounds, bars go from the lowest to the highest", "dim", 12)
    highest = _round_up(max(values))
    for step in range(5):
        value = highest * step / 4
        picture.line("grid", (_LEFT, _y(value, highest)), (_RIGHT, _y(value, highest)))
        picture.text(_LEFT - 8, _y(value, highest) + 4, f"{value:,.0f}", "dim", 12, "end")
    for index, ratio in enumerate(ratios):
        picture.text(_x(index, ratios), _BOTTOM + 22, f"{ratio}x", "bold", 13, "middle")
    picture.text((_LEFT + _RIGHT) / 2, _BOTTOM + 46, "adapters in use, in multiples of what fits", "", 13, "middle")
    taken: list[float] = []
    for it, kind in zip(lines, _KINDS, strict=True):
        _draw_line(picture, it, kind, highest, ratios, taken)
    return picture.svg()


def _draw_line(
    picture: Picture, drawn: Line, kind: str, highest: float, ratios: Sequence[int], taken: list[float]
) -> None:
    shown = [(_x(index, ratios), point) for index, point in enumerate(drawn.points) if point]
    if not shown:
        return
    middles = [(x, _y(statistics.median(point), highest)) for x, point in shown]
    picture.line(kind, *middles, dashed="p50" in drawn.name)
    for (x, y), (_, point) in zip(middles, shown, strict=True):
        picture.line("line", (x, _y(min(point), highest)), (x, _y(max(point), highest)))
        picture.dot(x, y, 3)
    label = middles[-1][1]
    while any(abs(label - other) < 15 for other in taken):  # beside each other's ends, and not over them
        label -= 15
    taken.append(label)
    picture.text(middles[-1][0] + 10, label + 4, drawn.name, "", 12)


def _x(index: int, ratios: Sequence[int]) -> float:
    """By the ratio's logarithm: a time that grows by so much with each doubling is a straight line."""
    return _LEFT + 40 + (_RIGHT - _LEFT - 60) * math.log(ratios[index] / ratios[0]) / math.log(ratios[-1] / ratios[0])


def _y(value: float, highest: float) -> float:
    return _BOTTOM - (_BOTTOM - _TOP) * value / highest


def _round_up(value: float) -> float:
    """To a number whose quarters are short."""
    size: float = 10 ** len(str(int(value))) / 10
    return next(size * step for step in (1, 2, 4, 6, 8, 10) if value <= size * step)
