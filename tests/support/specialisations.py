"""What an engine's launches would be compiled for, beside what the lists of configurations say. Nothing is compiled.

    python -m tests.support.specialisations MODEL_TYPE... [--ops OP...] [--narrow]

Runs the warm-up as compile_only does and compares each launch with the listed configurations of the same kernel and
the same constants. Exits with 1 and the differences if one is not listed as it is launched, and if nothing that an op
lists is launched at all. --narrow: the same heads and experts over small matrices, for ops that know nothing of those.
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
_AS_LISTED = {"llama": dict(head_dim=128), "deepseek_v2": dict(n_routed_experts=64)}  # what of a model the lists name


class Launch(NamedTuple):
    """types: of arguments that are not constexpr, as a Configuration has them."""

    kernel: Any
    types: Mapping[str, Any]
    constants: Mapping[str, Any]


@contextmanager
def noted() -> Iterator[list[Launch]]:
    """Every new specialisation is noted instead of compiled, and the launch left out."""
    launches: list[Launch] = []

    def note(*, fn: Any, compile: Mapping[str, Any], **_: object) -> bool:
        kernel = fn.jit_function
        declared = {param.name for param in kernel.params if param.is_constexpr}
        given = {kernel.arg_names[path[0]]: value for path, value in compile["constants"].items() if len(path) == 1}
        (attributes,) = compile["configs"]
        types = {
            name: _as_listed(compile["signature"][name], (index,), attributes)
            for index, name in enumerate(kernel.arg_names) if name not in declared
        }  # fmt: skip
        launches.append(Launch(kernel, types, {name: given[name] for name in declared}))
        return True

    knobs.runtime.jit_cache_hook = note
    try:
        yield launches
    finally:
        knobs.runtime.jit_cache_hook = None


def _as_listed(kind: Any, path: tuple[int, ...], attributes: Mapping[tuple[int, ...], object]) -> Any:
    """A type in the notation of Configuration. An argument that Triton makes a constant is an integer that is 1."""
    if isinstance(kind, tuple):
        members = (_as_listed(member, (*path, index), attributes) for index, member in enumerate(kind))
        return type(kind)(*members)
    if kind == "constexpr":
        return "i32:1"
    return f"{kind}:16" if attributes.get(path) else kind


def differences(launches: list[Launch], listed: list[Configuration]) -> tuple[set[str], list[str]]:
    """Listed configurations whose constants are launched, by name, and what those have wrong."""
    found: set[str] = set()
    wrong: list[str] = []
    for launch in launches:
        same = [it for it in listed if it.kernel is launch.kernel and dict(it.constants) == dict(launch.constants)]
        # a list need not name every dtype that a model may have, but what it names must be what is launched
        same = [it for it in same if _elements(it.types, launch) == _elements(launch.types, launch)]
        found |= {it.name for it in same}
        if same and not any(_flat(it.types, launch) == _flat(launch.types, launch) for it in same):
            wrong += [f"{launch.kernel.__name__} {same[0].name}: {_difference(same[0], launch)}"]
    return found, wrong


def _flat(types: Mapping[str, Any], launch: Launch) -> dict[str, str]:
    """Types of the launch's arguments, members of a tuple as "argument.member"."""
    flat: dict[str, str] = {}
    for name in launch.types:
        kind = types[name]
        if isinstance(kind, tuple):
            flat |= {f"{name}.{member}": it for member, it in kind._asdict().items()}
        else:
            flat[name] = kind
    return flat


def _elements(types: Mapping[str, Any], launch: Launch) -> list[str]:
    return sorted(kind.partition(":")[0] for kind in _flat(types, launch).values() if kind.startswith(("*bf", "*fp")))


def _difference(it: Configuration, launch: Launch) -> str:
    listed = _flat(it.types, launch)
    return "; ".join(f"{name} is {kind}, listed {listed[name]}" for name, kind in _flat(launch.types, launch).items()
                     if kind != listed[name])  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=tuple(compile_only.MODELS))
    parser.add_argument("--ops", nargs="+", default=OPS, choices=OPS)
    parser.add_argument("--narrow", action="store_true")
    options = parser.parse_args()
    triton.runtime.driver.set_active(compile_only.CompileOnly())
    with everywhere(), noted() as launches:
        for model_type in options.models:
            sizes = (_NARROW if options.narrow else {}) | _AS_LISTED.get(model_type, {})
            compile_only.compile_engine(model_type, **sizes)
    status = 0
    for op in options.ops:
        listed = list(importlib.import_module(f"kernels.{op}.kernel").configurations())
        found, wrong = differences(launches, listed)
        print(f"{op}: {len(found)} of {len(listed)} listed are launched", *sorted(set(wrong)), sep="\n  ", flush=True)
        status |= not found or bool(wrong)
    return status


if __name__ == "__main__":
    sys.exit(main())
