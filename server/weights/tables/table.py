"""What residency asks of a table."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from adapters_store.parts import PartKind, TensorRef
from kernels.adapter_rows import ShapeKey
from server.weights.transfer import Derive


class Mapped(NamedTuple):
    """Room that was made for an adapter's parts. A transfer fills it, off the step loop: what becomes zero first, where
    each tensor must be copied to (gone through there too: they may be thousands), and what is then computed of them and
    of the base's weights."""

    places: Iterable[tuple[TensorRef, Tensor]]
    cleared: Sequence[Tensor] = ()
    derive: Sequence[Derive] = ()


class Table(Protocol):
    """The parts of one kind, by adapter slot (from 1 on; slot 0 is the base and holds none).

    absent -> map -> mapped, being filled -> install -> seen by kernels -> unmap -> absent
    A transfer that fails is unmapped without having been installed.
    """

    @property
    def kind(self) -> PartKind: ...

    def refusal(self, parts: Sequence[Any]) -> str | None:
        """Why these can never be placed, if so."""

    def pages_for(self, slot: int, parts: Sequence[Any]) -> int:
        """How many pages of the budget mapping them would take."""

    def map(self, slot: int, parts: Sequence[Any]) -> Mapped:
        """Make room, counted in the pool. Raises ArenaError, and then nothing has changed."""

    def install(self, slot: int) -> None:
        """Let kernels see the slot: its bytes are in place. On the step loop; never raises: what cannot be installed
        is refused, or not mapped."""

    def unmap(self, slot: int) -> None:
        """Hide the slot from kernels that are launched later, and give its room back."""

    def has(self, slot: int) -> bool:
        """Whether the slot is mapped."""

    def shape_key(self, slot: int) -> ShapeKey:
        """What a step with this slot's rows goes through for it. ShapeKey() if the slot holds no such part."""

    @property
    def num_mapped_pages(self) -> int:
        """That adapters' parts occupy; a page that two share counts once."""

    def check(self) -> None:
        """Recompute what is kept incrementally."""


def to_device(target: Tensor, values: Sequence[Any]) -> None:
    """Copy numbers to where kernels read them, after every launch so far and before every later one.

    On a GPU from page-locked memory, which torch keeps until the copy is over: the loop does not wait.
    """
    source = torch.tensor(values, dtype=target.dtype, pin_memory=target.is_cuda)
    target.copy_(source.view(target.shape), non_blocking=True)
