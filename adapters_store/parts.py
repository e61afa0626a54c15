"""Canonical parts: what every adapter format is read into.

Tables and kernels know only parts, so a new format is a new reader, and a new family is at most one new part.
Parts describe tensors by where they lie; nothing is loaded here. There may be a hundred thousand, which the
garbage collector is told to leave alone: no cycle can run through them.
"""

import os
from collections import Counter
from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import msgspec

from adapters_store.errors import shown
from adapters_store.ref import Kind

if TYPE_CHECKING:
    from adapters_store.room import Room

MAX_RANK = 4096  # of a low-rank part: kernels keep a number a row and rank, and count within a matrix in 32 bits
BYTES_PER_ELEMENT = {"F32": 4, "F16": 2, "BF16": 2}


class Whole(msgspec.Struct, frozen=True, gc=False):
    """What a file holds, of which a tensor is made: seen as `shape`, its dimensions put in `order` (none given: left as
    they are), and then cut from `start` on in each.

    Running example: B of 4 experts at rank 2, with the expert as the fastest index of its columns, is stored [out, 8].
    As one matrix an expert, [4, out, 2], it is Whole((out, 2, 4), start (0, 0, 0), order (2, 0, 1)).
    """

    shape: tuple[int, ...]
    start: tuple[int, ...]
    order: tuple[int, ...] = ()


class TensorRef(msgspec.Struct, frozen=True, tag="tensor", gc=False):
    """Where a tensor lies: in `file` (one of the package's), from byte `offset` on. `dtype` as safetensors name it.

    `cut_from`: the bytes are those of a larger tensor, of which this one is a block; None: they are its own. A reader
    that rewrites tensors (what is exactly low rank, say) names a file that it wrote itself: a file is a file.
    """

    file: str
    key: str
    shape: tuple[int, ...]
    dtype: str
    offset: int = 0
    cut_from: Whole | None = None

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * BYTES_PER_ELEMENT[self.dtype]

    @property
    def stored_elements(self) -> int:
        """Of what lies at `offset`."""
        return prod(self.cut_from.shape) if self.cut_from else self.num_elements

    @property
    def pieces(self) -> tuple["Piece", ...]:
        return (Piece(self, (0,) * len(self.shape)),)


class Piece(msgspec.Struct, frozen=True, gc=False):
    """A tensor, at which element of another one it begins, and what it is multiplied with there."""

    tensor: TensorRef
    start: tuple[int, ...]
    factor: float = 1.0


class Assembled(msgspec.Struct, frozen=True, tag="assembled", gc=False):
    """A tensor that no file holds as such: zero but for its pieces, which do not overlap."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def is_covered(self) -> bool:
        """Whether the pieces leave nothing of it zero."""
        return sum(piece.tensor.num_elements for piece in self.pieces) == self.num_elements


# what a device holds of an adapter
Operand = TensorRef | Assembled


class SourceFile(msgspec.Struct, frozen=True, gc=False):
    """A file as it was verified, so that a later change is noticed before its bytes are used.

    `path` is free of links (for a hub cache the blob, not the snapshot's link), and absolute; or relative, to a
    directory that is known to whoever has the package. `sha256` in hexadecimal.
    """

    file: str
    path: str
    size: int
    sha256: str


class LowRank(msgspec.Struct, frozen=True, tag="low_rank", gc=False):
    """y += scale * B(A x) on one linear; then, with a magnitude (DoRA), what y holds beside the bias is scaled. a:
    [rank, in], b: [out, rank], magnitude: [out], the norms that the rows of the adapted matrix shall have.

    Or on one matrix of all routed experts of a layer (`ExpertStack.matrices` has their names): a [M, rank, in],
    b [M, out, rank], each expert with its own; or with 1 in place of M, which then all share.
    """

    module: str
    a: Operand
    b: Operand
    scale: float
    magnitude: Operand | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    @property
    def is_in_experts(self) -> bool:
        return len(self.a.shape) == 3

    @property
    def operands(self) -> tuple[Operand, ...]:
        """What the device holds of it."""
        return (self.a, self.b) if self.magnitude is None else (self.a, self.b, self.magnitude)

    @property
    def tensors(self) -> tuple[TensorRef, ...]:
        return tuple(piece.tensor for operand in self.operands for piece in operand.pieces)

    def num_bytes(self, bytes_per_element: int) -> int:
        """On a device, at least. What becomes of a magnitude is float32."""
        own = (self.a.num_elements + self.b.num_elements) * bytes_per_element
        return own if self.magnitude is None else own + self.magnitude.num_elements * 4

    @staticmethod
    def described(parts: Sequence["LowRank"]) -> dict[str, object]:
        return {"linears": {part.module: part._told() for part in parts}}

    def _told(self) -> dict[str, object]:
        told: dict[str, object] = {"rank": self.rank, "scale": self.scale}
        return told if self.magnitude is None else told | {"dora": True}

    @staticmethod
    def lack_of_room(parts: Sequence["LowRank"], room: "Room") -> str | None:
        for part in parts:
            if part.rank > MAX_RANK:
                return (
                    f"{shown(part.module)} has the rank {part.rank:,}; at most {MAX_RANK:,} is served: cut it by its "
                    "singular values (a rank above the matrix's own size adds nothing), or merge it into its base"
                )
        return None


class ExpertReplacement(msgspec.Struct, frozen=True, tag="expert_replacement", gc=False):
    """The token uses this expert instead of the base's. gate, up: [I, H], down: [H, I].

    `gate_up` has two tensors (gate, up), or one that is already [2I, H].
    """

    layer: int
    expert: int
    gate_up: tuple[TensorRef, ...]
    down: TensorRef

    @property
    def operands(self) -> tuple[Operand, ...]:
        return self.tensors

    @property
    def tensors(self) -> tuple[TensorRef, ...]:
        return (*self.gate_up, self.down)

    def num_bytes(self, bytes_per_element: int) -> int:
        """On a device."""
        return sum(tensor.num_elements for tensor in self.tensors) * bytes_per_element

    @staticmethod
    def described(parts: Sequence["ExpertReplacement"]) -> dict[str, object]:
        by_layer: dict[str, list[int]] = {}
        for part in sorted(parts, key=lambda part: (part.layer, part.expert)):
            by_layer.setdefault(str(part.layer), []).append(part.expert)
        return {"experts": by_layer}

    @staticmethod
    def lack_of_room(parts: Sequence["ExpertReplacement"], room: "Room") -> str | None:
        for layer, count in sorted(Counter(part.layer for part in parts).items()):
            if count > room.experts_per_layer:
                return (
                    f"the adapter tunes {count} experts of layer {layer}; this server has room for "
                    f"{room.experts_per_layer} (--max-experts-per-adapter)"
                )
        return None


# A kind of part says of itself which tensors of the files it has (`tensors`), what a device holds of it (`operands`),
# how many bytes that is (`num_bytes`), what people are told of those of one adapter (`described`), and why a server has
# no room for them (`lack_of_room`, None if it has).
Part = LowRank | ExpertReplacement
PartKind = type[LowRank] | type[ExpertReplacement]


class AdapterPackage(msgspec.Struct, frozen=True):
    """A verified adapter on disk: everything needed to load it, and to say what it is.

    `declared_base` is the base model that the adapter's own files name, cleaned; None where they name none. `notes` say
    in sentences what was understood from something other than the plain form: a name, a key, a layout.
    """

    kind: Kind
    revision: str
    files: tuple[SourceFile, ...]
    parts: tuple[Part, ...]
    declared_base: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def num_elements(self) -> int:
        """Elements that a device holds for this adapter."""
        return sum(operand.num_elements for part in self.parts for operand in part.operands)

    def located(self, root: str) -> "AdapterPackage":
        """The same with files whose paths were relative to `root`."""
        files = tuple(msgspec.structs.replace(it, path=os.path.join(root, it.path)) for it in self.files)
        return msgspec.structs.replace(self, files=files)

    @property
    def file_bytes(self) -> int:
        return sum(file.size for file in self.files)


def by_kind(parts: Sequence[Part]) -> dict[PartKind, list[Any]]:
    """The parts of an adapter, of each kind that it has."""
    kinds: dict[PartKind, list[Any]] = {}
    for part in parts:
        kinds.setdefault(type(part), []).append(part)
    return kinds


def describe(package: AdapterPackage) -> dict[str, object]:
    """What was bound, for people."""
    places = {(tensor.file, tensor.offset) for part in package.parts for tensor in part.tensors}
    described: dict[str, object] = {"bound_tensors": len(places)}
    for kind, parts in by_kind(package.parts).items():
        described |= kind.described(parts)
    return described
