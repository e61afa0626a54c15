"""Compiled kernels for the host: C++ beside each op's reference, built on the machine that runs it.

An op that has one keeps it in its own folder as host.cpp, with host.py to call it; what they share lies here. They take
float32 and bfloat16 on the CPU, add up in float32, read weights and caches where they lie, and share their work among
the threads that torch computes with. Where they cannot be built, references compute, as they do for other types.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from ctypes import CDLL, RTLD_GLOBAL
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.host import build, kept, prebuilt
from kernels.host.build import CannotBuild

__all__ = ["library", "references_only", "status", "takes", "takes_on"]

_DTYPES = (torch.float32, torch.bfloat16)
_OPENMP = re.compile(r"lib(gomp|omp|iomp5)\b.*\.so.*")
_off = ContextVar("off", default=False)


def takes(tensor: Tensor) -> bool:
    """Whether host kernels compute on this tensor. Where they do not, references do."""
    return tensor.device.type == "cpu" and tensor.dtype in _DTYPES and _is_on()


def takes_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether host kernels compute on tensors of this type and device."""
    return device.type == "cpu" and dtype in _DTYPES and _is_on()


def library() -> CDLL:
    """The kernels; call it where `takes` says so. The first call in a process may build them, which takes seconds."""
    found = _loaded()
    assert isinstance(found, _Loaded), found
    return found.library


def status() -> str:
    """For people: what they were built with, or why there are none and what to do about it."""
    found = _loaded()
    return found.told if isinstance(found, _Loaded) else found


@contextmanager
def references_only() -> Iterator[None]:
    """Leave everything to the references."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


def _is_on() -> bool:
    return not _off.get() and isinstance(_loaded(), _Loaded)


class _Loaded(NamedTuple):
    library: CDLL
    told: str


@cache
def _loaded() -> _Loaded | str:
    """The library, or why there is none: built here before, or now, or brought by the wheel."""
    try:
        _share_openmp()
        try:
            return _built_here()
        except CannotBuild:
            brought = prebuilt.best()
            if brought is None:
                raise
            kind, found = brought
            return _Loaded(CDLL(str(found)), f"brought by the wheel, for {kind}")
    except (CannotBuild, OSError) as error:
        return str(error)


def _built_here() -> _Loaded:
    """By the first compiler whose library can be loaded. Raises CannotBuild, with what the first one had to say."""
    failed = None
    for compiler in build.compilers():
        try:
            told = f"built with {build.version(compiler)} for this processor"
            name = f"{build.of_sources()}-{build.of_machine(compiler)}.so"
            return _Loaded(_kept_before(name) or _kept_now(build.compiled(compiler, build.NATIVE), name), told)
        except CannotBuild as error:
            failed = failed or error
    assert failed is not None
    raise failed


def _kept_before(name: str) -> CDLL | None:
    directory = kept.directory()
    code = kept.read(directory / name) if directory else None
    if directory is None or code is None:
        return None
    try:
        return CDLL(str(directory / name))
    except OSError:  # nothing may be executed where it lies, or it was made for another system
        try:
            return _loaded_elsewhere(code)
        except OSError:
            return None


def _kept_now(code: bytes, name: str) -> CDLL:
    """Raises CannotBuild."""
    directory = kept.directory()
    if directory is not None:
        try:
            kept.keep(code, directory / name)
            return CDLL(str(directory / name))
        except OSError:  # no room, read-only, or nothing may be executed there
            pass
    try:
        return _loaded_elsewhere(code)
    except OSError as error:
        raise CannotBuild(f"what was compiled cannot be loaded ({error}), so references compute") from None


def _loaded_elsewhere(code: bytes) -> CDLL:
    """Out of a place that is removed at once."""
    with kept.for_now() as place:
        (place / "kernels.so").write_bytes(code)
        return CDLL(str(place / "kernels.so"))


def _share_openmp() -> None:
    """Let the library find the OpenMP runtime that torch has loaded, whatever that is called. A second one would have
    threads of its own, and not hear of torch.set_num_threads. Raises OSError."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    mapped = dict.fromkeys(fields[5] for line in lines if len(fields := line.split(maxsplit=5)) == 6)
    runtimes = [it for it in mapped if _OPENMP.fullmatch(os.path.basename(it)) and not it.endswith(" (deleted)")]
    # other libraries may have brought theirs: torch's lies beside it, or is the system's
    beside = str(Path(torch.__file__).resolve().parent)
    runtimes.sort(key=lambda path: not path.startswith(beside))
    CDLL(runtimes[0] if runtimes else "libgomp.so.1", RTLD_GLOBAL)
