"""Throughput against the number of adapters, from benchmarks/results/adapter_counts.json.

Drawn are tokens a CPU second, which other work disturbs less than tokens a second; the results hold both.
"""

import json
from pathlib import Path
from typing import Any

from docs.pictures.drawing import WIDTH, Picture

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "adapter_counts.json"
LEFT, RIGHT, TOP, BOTTOM = 84, WIDTH - 36, 92, 352  # of the plot
HIGHEST = 120  # per cent


def draw() -> Picture:
    result: dict[str, Any] = json.loads(RESULTS.read_text())
    base, *points = result["points"]
    first, last = points[0], points[-1]
    picture = Picture(
        500,
        "Throughput against the number of LoRA adapters in a batch",
        f"Measured: output tokens a CPU second in per cent of the base alone, {_per_cent(first)} with one adapter, "
        f"{_per_cent(last)} with {last['adapters']}.",
    )
    picture.text(24, 34, "Throughput against the number of LoRA adapters in the batch", "bold", 17)
    picture.text(24, 58, "Output tokens for each CPU second of the server, in per cent of the base alone; "
                 f"{result['requests']} requests at once", "dim", 14)  # fmt: skip
    _axes(picture, base, points)
    picture.line("curve", *((_x(points, index), _y(_ratio(it, "median"))) for index, it in enumerate(points)))
    for index, it in enumerate(points):
        _point(picture, _x(points, index), it)
    _caption(picture, result)
    return picture


def _axes(picture: Picture, base: dict[str, Any], points: list[dict[str, Any]]) -> None:
    for value in range(0, HIGHEST, 20):
        picture.line("grid", (LEFT, _y(value)), (RIGHT, _y(value)))
        picture.text(LEFT - 10, _y(value) + 5, f"{value} %", "dim", 13, "end")
    picture.line("line", (LEFT, _y(100)), (RIGHT, _y(100)), dashed=True)
    picture.text(RIGHT, _y(100) - 8, f"the base alone: {base['tokens_per_cpu_s']['median']:.0f} tokens a CPU second",
                 "dim", 13, "end")  # fmt: skip
    picture.line("line", (LEFT, BOTTOM), (RIGHT, BOTTOM))
    for index, it in enumerate(points):
        picture.text(_x(points, index), BOTTOM + 22, str(it["adapters"]), "bold", 14, "middle")
    picture.text((LEFT + RIGHT) / 2, BOTTOM + 46, "adapters that the requests of the batch name, equally often", "",
                 14, "middle")  # fmt: skip


def _point(picture: Picture, x: float, it: dict[str, Any]) -> None:
    low, high = _y(_ratio(it, "lowest")), _y(_ratio(it, "highest"))
    picture.line("line", (x, low), (x, high))
    for y in (low, high):
        picture.line("line", (x - 5, y), (x + 5, y))
    picture.dot(x, _y(_ratio(it, "median")), 5)
    picture.text(x, low + 20, _per_cent(it), "bold", 14, "middle")


def _caption(picture: Picture, result: dict[str, Any]) -> None:
    rounds, versions, prompt = result["rounds"], result["versions"], result["prompt_tokens"]
    others = [100 * it["other_work"] for it in rounds]
    picture.lines(24, BOTTOM + 78, [
        f"Dots: median of {len(rounds)} rounds, each beside the base in the same round; bars: lowest and highest.",
        f"Measured {result['date']} on {result['machine']}, the engine on {_threads(result['engine_threads'])}, "
        f"torch {versions['torch']}.",
        f"{result['model'][0].upper()}{result['model'][1:]}.",
        f"Prompts of {prompt[0]} to {prompt[1]} tokens, {result['new_tokens']} new ones each, over HTTP. "
        f"Other work took {min(others):.0f} to {max(others):.0f} % of the machine meanwhile.",
    ], "dim", 12)  # fmt: skip


def _x(points: list[dict[str, Any]], index: int) -> float:
    return LEFT + (RIGHT - LEFT) * (index + 0.5) / len(points)


def _y(per_cent: float) -> float:
    return BOTTOM - (BOTTOM - TOP) * per_cent / HIGHEST


def _ratio(it: dict[str, Any], which: str) -> float:
    return 100 * float(it["of_base"]["tokens_per_cpu_s"][which])


def _threads(count: int) -> str:
    return "one thread" if count == 1 else f"{count} threads"


def _per_cent(it: dict[str, Any]) -> str:
    return f"{_ratio(it, 'median'):.0f} %"
