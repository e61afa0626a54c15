"""What residency asks of a table, and a transfer of what a table prepares."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from adapters_store.parts import PartKind, TensorRef
from kernels.adapter_rows import ShapeKey

Place = tuple[TensorRef, Tensor]
Derive = Callable[[], None]


class Prepared(NamedTuple):
    """What a transfer does with the room of an adapter's parts: what becomes zero first, where each tensor must be
    copied to (gone through once: they may be thousands), what is then computed of them and of the base's weights, and
    what must be finite in the end. Each of the last lies in one piece; they are as few as may be."""

    places: Iterable[Place]
    cleared: Sequence[Tensor] = ()
    derive: Sequence[Derive] = ()
    checked: Sequence[Tensor] = ()


class Layout(Protocol):
    """What is to be known of an adapter's parts to make room for them; each table has its own.

    It goes through all parts, so it is made once for an adapter and kept.
    """

    @property
    def refusal(self) -> str | None:
        """Why they can never be placed, if so. Then nothing else may be asked of it."""


class Table(Protocol):
    """The parts of one kind, by adapter slot (from 1 on; slot 0 is the base and holds none).

    absent -> map -> mapped -> prepare, and a transfer fills it -> install -> seen by kernels -> unmap -> absent
    All but `prepare` run on the step loop, and take it microseconds: they count, and flip what has been prepared. A
    transfer that fails is unmapped without having been installed, perhaps without having been prepared.
    """

    @property
    def kind(self) -> PartKind: ...

    def layout(self, parts: Sequence[Any]) -> Any:
        """A Layout of these."""

    def pages_for(self, layout: Any) -> int:
        """How many pages of the budget mapping it takes, in whatever slot."""

    def map(self, slot: int, layout: Any) -> None:
        """Make room, counted in the pool. Raises ArenaError, and then nothing has changed."""

    def prepare(self, slot: int) -> Prepared:
        """On the loading thread, of a slot that stays mapped meanwhile: everything that filling and `install` need."""

    def install(self, slot: int) -> None:
        """Let kernels see the slot: its bytes are in place. Never raises: what cannot be installed is refused, or not
        mapped, or a transfer's failure."""

    def unmap(self, slot: int) -> None:
        """Hide the slot from kernels that are launched later, and give its room back. No transfer is under way."""

    def has(self, slot: int) -> bool:
        """Whether the slot is mapped."""

    def shape_key(self, slot: int) -> ShapeKey:
        """What a step with this slot's rows goes through for it. ShapeKey() if the slot holds no such part."""

    @property
    def num_mapped_pages(self) -> int:
        """That adapters' parts occupy; a page that two share counts once."""

    def check(self) -> None:
        """Recompute what is kept incrementally."""


def on_host(shape: Sequence[int], like: Tensor) -> Tensor:
    """Zeros for numbers that will be copied to `like`'s device, without a wait: where that is a GPU, in page-locked
    memory, which torch keeps until such copies are over."""
    return torch.zeros(tuple(shape), dtype=like.dtype, pin_memory=like.is_cuda)
