"""Libraries that a wheel brings, for machines without a compiler: a few kinds of processors, the most able one first.

setup.py makes them. Their names say which sources they were made from, so those of another version are not loaded.
"""

import os
from pathlib import Path

from kernels.host import build

DIRECTORY = Path(__file__).resolve().parent / "prebuilt"


def best() -> tuple[str, Path] | None:
    """The kind and the library that fit this processor best, if any is there."""
    flags = set(build.processor()[1].split())
    for variant in build.VARIANTS.get(os.uname().machine, ()):
        library = DIRECTORY / variant.file_name()
        if variant.needs <= flags and library.is_file():
            return variant.name, library
    return None
