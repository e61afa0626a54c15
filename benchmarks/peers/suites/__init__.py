"""The suites by their letters. Each file says what it asks, and its `run(plan)` returns what it found."""

from types import ModuleType

from benchmarks.peers.suites import (
    clients,
    demo,
    many_adapters,
    memory,
    mixture,
    neighbours,
    overhead,
    prefixes,
    starts,
    workload_a,
)

SUITES: dict[str, ModuleType] = {
    "a": workload_a, "b": many_adapters, "c": mixture, "d": demo, "e": neighbours, "f": prefixes, "g": overhead,
    "h": starts, "i": memory, "j": clients,
}  # fmt: skip
