"""What an engine's launches would be compiled for, beside what the lists of configurations say. Nothing is compiled.

    python -m tests.support.specialisations MODEL_TYPE... [--ops OP...] [--narrow]

Runs the warm-up as compile_only does and compares each launch with the listed configurations of the same kernel and
the same constants. Exits with 1 and the differences if one is not listed as it is launched. --narrow: the same heads
over small matrices, for ops that know nothing of those.
"""

import argparse
import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from tests.support import compile_only  # first: it turns the interpreter off

# isort: split
import triton
from triton import knobs

from kernels.compiled import OPS, everywhere
from kernels.compiled.kernel import Configuration

_NARROW = dict(hidden_size=256, intermediate_size=256, moe_intermediate_size=128)
_HEADS = {"llama": dict(head_dim=128)}  # where it would follow from the width


class Launch(NamedTuple):
    """types: of arguments that are not constants; "constexpr" for an integer that is 1. aligned: multiples of 16."""

    kernel: Any
    types: Mapping[str, str]
    aligned: frozenset[str]
    constants: Mapping[str, Any]


@contextmanager
def noted() -> Iterator[list[Launch]]:
    """Every new specialisation is noted instead of compiled, and the launch left out."""
    launches: list[Launch] = []

    def note(*, fn: Any, compile: Mapping[str, Any], **_: object) -> bool:
        kernel = fn.jit_function
        names = kernel.arg_names
        given = {names[path[0]]: value for path, value in compile["constants"].items()}
        declared = {param.name for param in kernel.params if param.is_constexpr}
        launches.append(Launch(
            kernel,
            {name: kind for name, kind in compile["signature"].items() if name not in declared},
            frozenset(names[path[0]] for path, attributes in compile["configs"][0].items() if attributes)
            - declared,
            {name: value for name, value in given.items() if name in declared},
        ))  # fmt: skip
        return True

    knobs.runtime.jit_cache_hook = note
    try:
        yield launches
    finally:
        knobs.runtime.jit_cache_hook = None


def differences(launches: list[Launch], listed: list[Configuration]) -> tuple[int, list[str]]:
    """How many launches have a configuration of their constants in the list, and what those have wrong."""
    found, wrong = 0, []
    for launch in launches:
        same = [it for it in listed if it.kernel is launch.kernel and dict(it.constants) == dict(launch.constants)]
        types = [{name: it.types[name] for name in launch.types} for it in same]
        found += bool(same)
        # a list need not name every dtype that a model may have, but what it names must be what is launched
        elements = [it for it, its in zip(same, types, strict=True) if _elements(its) == _elements(launch.types)]
        if elements and not any(_is(it, launch) for it in elements):
            wrong += [f"{launch.kernel.__name__} {elements[0].name}: {_difference(elements[0], launch)}"]
    return found, wrong


def _elements(types: Mapping[str, str]) -> list[str]:
    return sorted(kind for kind in types.values() if kind.startswith(("*bf", "*fp")))


def _is(it: Configuration, launch: Launch) -> bool:
    types = {name: it.types[name] for name in launch.types}
    return types == launch.types and launch.aligned == {name for name in it.aligned if name in types}


def _difference(it: Configuration, launch: Launch) -> str:
    types = [f"{name} is {kind}, listed {it.types[name]}" for name, kind in launch.types.items()
             if kind != it.types[name]]  # fmt: skip
    aligned = {name for name in it.aligned if name in launch.types}
    return "; ".join([*types, *(f"{name} is aligned, listed not" for name in sorted(launch.aligned - aligned)),
                      *(f"{name} is not aligned, listed so" for name in sorted(aligned - launch.aligned))])  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=tuple(compile_only.MODELS))
    parser.add_argument("--ops", nargs="+", default=OPS, choices=OPS)
    parser.add_argument("--narrow", action="store_true")
    options = parser.parse_args()
    triton.runtime.driver.set_active(compile_only.CompileOnly())
    with everywhere(), noted() as launches:
        for model_type in options.models:
            compile_only.compile_engine(model_type, **(_NARROW | _HEADS.get(model_type, {}) if options.narrow else {}))
    status = 0
    for op in options.ops:
        found, wrong = differences(launches, list(importlib.import_module(f"kernels.{op}.kernel").configurations()))
        print(f"{op}: {found} launches of listed constants", *sorted(set(wrong)), sep="\n  ", flush=True)
        status |= not found or bool(wrong)
    return status


if __name__ == "__main__":
    sys.exit(main())
