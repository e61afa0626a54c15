"""What a row makes: an adapter's directory, and what is right about it."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from tests.census.families import Family

Deltas = dict[str, Tensor]  # parameter of the base -> what the adapter adds to it
MakeBase = Callable[[str], nn.Module]  # takes the attention implementation


class PeftCannot(Exception):
    """PEFT itself does not make, or does not load, such an adapter."""


@contextmanager
def peft_may_refuse() -> Iterator[None]:
    try:
        yield
    except PeftCannot:
        raise
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        told = re.sub(r"\{([^{}]*)\}", lambda it: ", ".join(sorted(it[1].split(", "))), first)  # a set has no order
        raise PeftCannot(f"{type(error).__name__}: {told[:160]}") from error


@dataclass(frozen=True)
class Made:
    """`truth` is a directory that PEFT reads (this one, or that from which it was rewritten), or what to add to the
    base, or None where only a refusal is right.

    `base` is served in place of the family's; `trained_on` is what the truth is computed on, where that is another."""

    path: Path
    truth: Path | Deltas | None
    base: MakeBase | None = None
    trained_on: MakeBase | None = None
    ignore_keys: tuple[str, ...] = ()


Maker = Callable[[Family, Path], Made]  # the path does not exist yet; its parent is the family's own


@dataclass(frozen=True)
class Row:
    name: str
    make: Maker
    families: Sequence[str]  # others are n/a


@dataclass(frozen=True)
class Section:
    key: str
    title: str
    rows: Sequence[Row]
