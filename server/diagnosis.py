"""What this machine has for serving, and what it lacks: for `heddle doctor`. Nothing here is served."""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

from kernels import host
from kernels.linear import FORMS
from kernels.linear.forms import why_not
from server.config import Dtype, EngineConfig
from server.cpu import Cpu, this_cpu
from server.device import CPU
from server.engine_process import build
from server.errors import ConfigError
from server.memory import available_bytes
from server.model.families import UnsupportedModelError
from server.model.linear_forms import ROW_CLASSES, best
from server.model.linear_times import LinearTimes, cache_directory
from server.version import VERSION

ROWS = tuple(map(str, ROW_CLASSES))  # heads of the columns of times
_TYPES = (torch.float32, torch.bfloat16)
_ROOM = 1 << 26  # bytes of KV cache, and for adapters, of an engine that is built to be looked at


class Fact(NamedTuple):
    what: str
    value: str
    remedy: str | None = None  # something is missing, and this is what can be done


def facts(threads: int) -> Iterator[Fact]:
    """threads: of the engine."""
    yield Fact("versions", f"heddle {VERSION}, python {sys.version.split()[0]}, torch {torch.__version__}, "
               f"transformers {_version('transformers')}")  # fmt: skip
    yield from _cpu(this_cpu(), threads)
    yield Fact("memory", f"{available_bytes() / 1e9:.1f} GB can be taken")
    yield Fact("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch sees")
    yield _host_kernels()
    yield from _forms()
    yield _cache(cache_directory())


def _host_kernels() -> Fact:
    """Whether ops beside the linears are compiled for this CPU; this may compile them."""
    there = host.takes_on(CPU, torch.float32)
    remedy = None if there else "every step takes about twice as long: a C++ compiler (g++ or clang++) is needed once"
    return Fact("CPU kernels", host.status(), remedy)


def _cpu(cpu: Cpu, threads: int) -> Iterator[Fact]:
    cores = len(os.sched_getaffinity(0))
    yield Fact("CPU", cpu.model or "unknown")
    is_old = cpu.flags and not {"avx2", "asimd"} & set(cpu.flags)
    yield Fact("instructions", " ".join(cpu.flags) or "unknown",
               "without AVX2 everything is several times slower: use a newer CPU" if is_old else None)  # fmt: skip
    remedy = f"more threads than cores wait for each other: --threads {cores}" if threads > cores else None
    yield Fact("threads", f"{threads} of {cores} cores", remedy)
    fast = cpu.multiplies_bfloat16
    yield Fact("bfloat16", "this CPU multiplies it: --dtype bfloat16 takes half the memory" if fast
               else "this CPU has no instructions for it: float32, the default, is faster")  # fmt: skip


def _forms() -> Iterator[Fact]:
    for dtype in _TYPES:
        reasons = {form.name: why_not(form, dtype) for form in FORMS}
        name = str(dtype).removeprefix("torch.")
        yield Fact(f"forms, {name}", ", ".join(form for form, reason in reasons.items() if reason is None))
        for form, reason in reasons.items():
            if reason is not None and not (form == "mkl-packed" and dtype != torch.float32):  # it has no other type
                yield Fact(f"form {form}", f"not for {name} here ({reason})")


def _cache(directory: Path) -> Fact:
    at = next(it for it in (directory, *directory.parents) if it.exists())
    is_writable = at.is_dir() and os.access(at, os.W_OK)
    remedy = None if is_writable else "products are measured at each start: set XDG_CACHE_HOME to a directory of yours"
    return Fact("times are kept in", str(directory), remedy)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(missing)"


class Row(NamedTuple):
    """Microseconds of one product, by row class ("" where there was no time to measure)."""

    shape: str
    form: str
    times: tuple[str, ...]
    choice: str  # in the first row of a shape


def times(threads: int) -> Iterator[Row]:
    """What was measured on this machine before."""
    by_name = {form.name: form for form in FORMS}
    for shape, measured in LinearTimes(cache_directory(), threads).shapes.items():
        forms = [by_name[name] for name in measured if name in by_name]
        choice = str(best(measured, forms, has_dense=False)) if forms else ""
        for form, seconds in measured.items():
            cells = [f"{it * 1e6:,.0f}" for it in seconds]
            yield Row(shape, form, (*cells, *("" for _ in ROW_CLASSES[len(cells) :])), choice)
            choice = ""


class Base(NamedTuple):
    """A base as it would be served on this CPU."""

    facts: tuple[Fact, ...]
    linears: tuple[tuple[int, str, str, int, str], ...]  # how many, shape, form, copies, remark


def base(model_dir: str, dtype: Dtype, threads: int) -> Base:
    """Builds an engine around it, on the CPU, and measures what was not measured before. Raises ConfigError
    where `heddle serve` would not start."""
    config = EngineConfig(model_dir, device="cpu", dtype=dtype, threads=threads, kv_cache_bytes=_ROOM,
                          adapter_bytes=_ROOM)  # fmt: skip
    try:
        assembly = build(config, lambda *_: None)
    except UnsupportedModelError as error:
        raise ConfigError(str(error)) from None
    info = assembly.info
    found = Counter((it.shape, str(it.choice), it.copies, it.is_tied) for it in assembly.linears)
    linears = tuple(
        (count, f"{shape[1]} -> {shape[0]}", choice, copies, "the embedding's too" if is_tied else "")
        for (shape, choice, copies, is_tied), count in found.items()
    )
    return Base(
        (
            Fact("base", f"{info.model_type}, {info.num_parameters / 1e6:,.1f} million parameters: served"),
            Fact("type", f"{info.dtype} on a CPU"),
            Fact("self-check", str(info.self_checked or "none").removeprefix("self-check: ")),
            Fact("longest sequence", f"{info.max_model_len:,} tokens with {_ROOM >> 20} MiB of KV cache"),
        ),
        linears,
    )
