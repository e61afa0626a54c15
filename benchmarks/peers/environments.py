"""Where each peer is installed: an environment of its own, as its program's header asks (clients/environments.py).

llama.cpp has no package of its own: its sources come with llama-cpp-python's, and are compiled here.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from clients.environments import NotInstalled, Program, install

PROGRAMS = Path(__file__).resolve().parent / "programs"
_COMPILE_S = 3600
# others drag them in, built for CUDA, and beside torch's CPU build they do not load; nobody here looks at pictures
_UNWANTED = ("torchvision", "torchaudio", "torchcodec")
__all__ = ["NotInstalled", "python_of", "llama_cpp"]


def default_rooms() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "heddle" / "peers"


def program(name: str) -> Program:
    return Program(PROGRAMS / f"{name}.py")


def python_of(name: str, rooms: Path, fresh: bool = False) -> Path:
    """The interpreter that runs programs/NAME.py. What is there already is used. Raises NotInstalled."""
    room = rooms / name
    is_new = fresh or not (room / ".installed").exists()
    python = Path(install(program(name), room, fresh)[0])
    if is_new:
        _run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *_UNWANTED], room)
    return python


def llama_cpp(rooms: Path, fresh: bool = False) -> tuple[Path, Path]:
    """(llama-server, the sources). Raises NotInstalled."""
    python, room = python_of("llama_cpp", rooms, fresh), rooms / "llama_cpp_build"
    sources, server = room / "sources", room / "sources" / "build" / "bin" / "llama-server"
    if server.exists():
        return server, sources
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            raise NotInstalled(f"{tool} is missing")
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir(parents=True)
    _run([str(python), "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:",
          "--dest", str(room), "llama-cpp-python"], room)  # fmt: skip
    archive = next(room.glob("llama_cpp_python-*.tar.gz"))
    with tarfile.open(archive) as packed:
        packed.extractall(room / "unpacked", filter="data")
    (next((room / "unpacked").iterdir()) / "vendor" / "llama.cpp").rename(sources)
    options = ("CMAKE_BUILD_TYPE=Release", "BUILD_SHARED_LIBS=OFF", "LLAMA_CURL=OFF", "LLAMA_OPENSSL=OFF",
               "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF")  # fmt: skip
    _run(["cmake", "-S", ".", "-B", "build", *(f"-D{it}" for it in options)], sources)
    _run(["cmake", "--build", "build", "--target", "llama-server", "-j", str(os.cpu_count() or 1)], sources)
    return server, sources


def _run(command: list[str], directory: Path) -> None:
    try:
        done = subprocess.run(["nice", *command], cwd=directory, stdin=subprocess.DEVNULL, capture_output=True,
                              text=True, timeout=_COMPILE_S)  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotInstalled(str(error)) from error
    if done.returncode:
        raise NotInstalled(f"{command[0]} ended with status {done.returncode}: {done.stderr.strip()[-300:]}")


_VERSIONS = """
import importlib.metadata, json, sys
found = {it.metadata["Name"]: it.version for it in importlib.metadata.distributions()}
print(json.dumps({it: found[it] for it in sys.argv[1:] if it in found}))
"""


def versions(python: Path, *packages: str) -> dict[str, str]:
    """Of packages in an interpreter's environment; of those that are there."""
    told = subprocess.run([str(python), "-c", _VERSIONS, *packages], capture_output=True, text=True, check=True)
    return dict(json.loads(told.stdout))


if __name__ == "__main__":
    for name in sys.argv[2:]:
        print(name, llama_cpp(Path(sys.argv[1])) if name == "llama_cpp" else python_of(name, Path(sys.argv[1])))
