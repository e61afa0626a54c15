"""Medians, spreads and ratios of samples. A ratio is made within a round, of the same requests; then the median."""

import statistics
from collections.abc import Sequence

from benchmarks.peers.load import Sample

Key = tuple[str, str]  # system, mode


def values_of(samples: Sequence[Sample], system: str, mode: str, unit: str) -> dict[int, float]:
    """By round."""
    return {
        it.round: it.figures[unit] for it in samples if (it.system, it.mode) == (system, mode) and unit in it.figures
    }


def median_of(samples: Sequence[Sample], system: str, mode: str, unit: str) -> float:
    return statistics.median(values_of(samples, system, mode, unit).values())


def ratios(samples: Sequence[Sample], of: Key, over: Key, unit: str) -> tuple[float | None, float, float]:
    """(median, lowest, highest) of the rounds that both took part in; no median where there are none."""
    mine, theirs = values_of(samples, *of, unit), values_of(samples, *over, unit)
    found = [mine[number] / theirs[number] for number in mine if theirs.get(number)]
    return (statistics.median(found), min(found), max(found)) if found else (None, 0.0, 0.0)


def keys(samples: Sequence[Sample]) -> list[Key]:
    """In the order of their first sample, systems of a mode together."""
    seen = list(dict.fromkeys((it.mode, it.system) for it in samples))
    modes = list(dict.fromkeys(mode for mode, _ in seen))
    return [(system, mode) for mode in modes for at, system in seen if at == mode]


def units(samples: Sequence[Sample]) -> list[str]:
    return list(dict.fromkeys(unit for it in samples for unit in it.figures))
