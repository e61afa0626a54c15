"""What products were measured to take on this machine, kept between starts in the user's cache."""

import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch

from kernels.host.kept import home
from server.cpu import this_cpu

log = logging.getLogger("heddle.linears")
_VERSION = 1  # of what the file means
Times = dict[str, list[float]]  # a form's name -> seconds of one product, by row class


class Shape(NamedTuple):
    """What a product's time depends on, beside the number of rows and the machine."""

    out_features: int
    in_features: int
    dtype: torch.dtype
    has_bias: bool

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.in_features} -> {self.out_features} {dtype}{' with bias' if self.has_bias else ''}"


class _File(msgspec.Struct):
    machine: dict[str, str]
    shapes: dict[str, Times]


def cache_directory() -> Path:
    """Where nothing can be read or written, for a user without a home."""
    return home() or Path(os.devnull)


def this_machine(threads: int) -> dict[str, str]:
    """Times hold for the same values of all of these."""
    cpu = this_cpu()
    return {
        "version": str(_VERSION),
        "torch": str(torch.__version__),
        "cpu": cpu.model,
        "flags": " ".join(cpu.flags),
        "threads": str(threads),
    }


class LinearTimes:
    """A file for each machine, or what counts as one (a number of threads). One that cannot be read is as none, and one
    that cannot be written costs the next start a second."""

    def __init__(self, directory: Path, threads: int) -> None:
        self.machine = this_machine(threads)
        digest = hashlib.sha256(json.dumps(self.machine, sort_keys=True).encode()).hexdigest()
        self.path = directory / f"linears-{digest[:16]}.json"
        self.shapes = self._read()

    def get(self, shape: Shape) -> Times | None:
        return self.shapes.get(str(shape))

    def put(self, shape: Shape, times: Times) -> None:
        self.shapes[str(shape)] = times

    def save(self) -> None:
        """Whole or not at all; with what another process may have measured meanwhile."""
        self.shapes = self._read() | self.shapes
        content = msgspec.json.format(msgspec.json.encode(_File(self.machine, self.shapes)))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.path.parent, prefix=".writing-") as scratch:
                Path(scratch, "times").write_bytes(content)
                os.replace(f"{scratch}/times", self.path)
        except OSError as error:
            log.warning("times of products are not kept: %s", error.strerror)

    def _read(self) -> dict[str, Times]:
        try:
            found = msgspec.json.decode(self.path.read_bytes(), type=_File)
        except (OSError, msgspec.MsgspecError):
            return {}
        sound = found.machine == self.machine and all(map(_is_sound, found.shapes.values()))
        return found.shapes if sound else {}


def _is_sound(times: Times) -> bool:
    lengths = {len(by_rows) for by_rows in times.values()}
    return len(lengths) == 1 and 0 not in lengths and all(t > 0 for by_rows in times.values() for t in by_rows)
