"""Compile the host's kernels: one shared library out of every kernels/*/host.cpp.

It is linked with no OpenMP runtime: a process must have one only, and that is torch's (`kernels/host/__init__.py`).
This file imports nothing of the project and no torch, because setup.py uses it where there is neither.
"""

import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

_ROOT = Path(__file__).resolve().parent.parent
_COMPILERS = ("c++", "g++", "clang++")
# -fno-math-errno: nobody reads errno, and it keeps loops from becoming vectors
FLAGS = ("-O3", "-std=c++17", "-fno-math-errno", "-fPIC", "-Wno-psabi")
NATIVE = ("-march=native",)
_TIMEOUT_S = 300  # of a source; the longest takes ten seconds
_VERSION_TIMEOUT_S = 20
_SLOWER = "references compute, at half the speed"

Compiler = tuple[str, ...]  # a command: CXX may have arguments


class Variant(NamedTuple):
    """A kind of processor that wheels bring a library for. needs: instruction sets by their names in /proc/cpuinfo."""

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str]

    def file_name(self) -> str:
        return f"{of_sources()}-{self.name}.so"


_V3 = frozenset("avx avx2 bmi1 bmi2 f16c fma abm movbe".split())
_V4 = _V3 | frozenset("avx512f avx512bw avx512cd avx512dq avx512vl".split())
VARIANTS = {  # by machine, the most able first
    "x86_64": (Variant("x86-64-v4", ("-march=x86-64-v4",), _V4), Variant("x86-64-v3", ("-march=x86-64-v3",), _V3)),
    "aarch64": (Variant("armv8-a", ("-march=armv8-a",), frozenset({"asimd"})),),
}
# of a library that is built on one machine and runs on another: whatever C++ runtime that one has
PORTABLE = ("-static-libstdc++", "-static-libgcc")


class CannotBuild(Exception):
    """There are no compiled kernels; the message says why, and what to do."""


def compilers() -> Iterator[Compiler]:
    """Those that there are: CXX first, where the environment has it. Raises CannotBuild if there is none."""
    seen = set()
    for command in (os.environ.get("CXX", ""), *_COMPILERS):
        name, *arguments = _words(command)
        found = shutil.which(name) if name else None
        compiler = (os.path.realpath(found), *arguments) if found else ()
        if found and compiler not in seen:
            seen.add(compiler)
            yield (found, *arguments)
    if not seen:
        raise CannotBuild(f"there is no C++ compiler (g++ or clang++), so {_SLOWER}; install one and start again")


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command) or [""]
    except ValueError:  # quotes that are left open
        return [command]


def compiled(compiler: Compiler, flags: Sequence[str], link: Sequence[str] = ()) -> bytes:
    """The library's content. Raises CannotBuild. flags: of the processor that it is for."""
    try:
        with tempfile.TemporaryDirectory(prefix="heddle-kernels-") as scratch:
            return _compiled_in(scratch, [*compiler, *FLAGS, *flags], link)
    except OSError as error:
        raise CannotBuild(f"the kernels cannot be compiled ({error}), so {_SLOWER}") from None


def bring(directory: Path) -> None:
    """Put a library for each kind of processor of this machine's architecture there. Raises CannotBuild."""
    compiler = next(compilers())
    directory.mkdir(parents=True, exist_ok=True)
    for variant in VARIANTS.get(os.uname().machine, ()):
        (directory / variant.file_name()).write_bytes(compiled(compiler, variant.flags, PORTABLE))


def _compiled_in(scratch: str, command: Sequence[str], link: Sequence[str]) -> bytes:
    objects = {source: f"{scratch}/{source.parent.name}.o" for source in sources()}

    def compile_one(source: Path) -> None:
        _run([*command, "-fopenmp", "-c", str(source), "-o", objects[source]])

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        list(threads.map(compile_one, objects))
    linked = f"{scratch}/linked.so"
    _run([*command, "-shared", *objects.values(), *link, "-o", linked])
    return Path(linked).read_bytes()


def _run(command: Sequence[str]) -> None:
    """Raises CannotBuild."""
    rc, _, told = _outcome(command, _TIMEOUT_S)
    if rc:
        first = next((line for line in told.splitlines() if "error" in line), told[:200])
        raise CannotBuild(
            f"{command[0]} does not compile the kernels ({first.strip()}), so {_SLOWER}; GCC 9 and newer do"
        )


def _outcome(command: Sequence[str], timeout_s: float) -> tuple[int, str, str]:
    """Exit status, output, errors. A compiler is several processes: all end where it takes too long. Raises
    CannotBuild."""
    try:
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            errors="replace", start_new_session=True, env={**os.environ, "LC_ALL": "C"},
        ) as process:  # fmt: skip
            try:
                out, told = process.communicate(timeout=timeout_s)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        return process.returncode, out, told
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotBuild(f"{command[0]} could not be run ({error}), so {_SLOWER}") from None


@cache
def version(compiler: Compiler) -> str:
    """The line by which it introduces itself. Raises CannotBuild."""
    rc, out, _ = _outcome([*compiler, "--version"], _VERSION_TIMEOUT_S)
    if rc or not out.strip():
        raise CannotBuild(f"{compiler[0]} is no C++ compiler, so {_SLOWER}; is CXX what it should be?")
    return out.partition("\n")[0].strip()


def sources() -> list[Path]:
    return sorted(_ROOT.glob("*/host.cpp"))


def of_sources() -> str:
    """Changes with every source, and with the flags that all libraries are compiled with."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for file in (*sources(), *sorted(_ROOT.glob("*/*.h"))):
        digest.update(f"\0{file.parent.name}/{file.name}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def of_machine(compiler: Compiler) -> str:
    """Changes with the compiler, the C library and the processor: machines of several kinds may share a home."""
    parts = (*compiler, version(compiler), *NATIVE, *platform.libc_ver(), os.uname().machine, *processor())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def processor() -> tuple[str, str]:
    """Model and instruction sets of the first one, as /proc/cpuinfo has them."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return "", ""
    said = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    model = " ".join(said.get(it, "") for it in ("vendor_id", "cpu family", "model", "model name", "CPU part"))
    return model, said.get("flags") or said.get("Features", "")


if __name__ == "__main__":  # for images: python kernels/host/build.py
    bring(Path(__file__).resolve().parent / "prebuilt")
