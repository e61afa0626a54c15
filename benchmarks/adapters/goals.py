"""What is asked of adapters that come and go, and how it is read off what was measured."""

from benchmarks.adapters import fairness, neighbours, sizes
from benchmarks.adapters.found import HEDDLE
from benchmarks.adapters.heddle import LOADS_PER_S
from benchmarks.peers.goals import Goal
from benchmarks.peers.suites.neighbours import QUIET

GOALS = (
    *(
        Goal("neighbours", f"{mode}: ITL p99 over quiet", (HEDDLE, mode), neighbours.P99, 1.2, (HEDDLE, QUIET),
             at_most=True)
        for mode in ("registered", *neighbours.LOADING, neighbours.ALL)
    ),
    *(
        Goal("neighbours", f"{mode}: of 4 uses a second, had to load", (HEDDLE, mode), LOADS_PER_S, 3.6)
        for mode in neighbours.LOADING
    ),
    Goal("neighbours", "of 50 registrations a second, were made", (HEDDLE, "registered"), "registered/s", 48.0),
    *(
        Goal("bytes", f"{number} ESFT adapters: fragmentation, %", (HEDDLE, f"true size, {number}"),
             sizes.FRAGMENTATION, 1.0, at_most=True)
        for number in sizes.COUNTS
    ),
    *(
        # half of the server is B's, which is twice the time; in steps a flood that makes steps long would look harmless
        Goal("fairness", f"{mode}: another adapter's {unit} over quiet", (HEDDLE, mode), unit, 3.0, (HEDDLE, QUIET),
             at_most=True)
        for mode in (fairness.MANY, fairness.LARGE, fairness.PROMPTS) for unit in (fairness.P90, fairness.BETWEEN)
    ),
    *(
        Goal("fairness", f"{mode}: tokens off the weights, %", (HEDDLE, mode), fairness.OFF, 15.0, at_most=True)
        for mode in fairness.WEIGHTS
    ),
)  # fmt: skip
