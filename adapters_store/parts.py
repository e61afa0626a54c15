"""Canonical parts: what every adapter format is read into.

Tables and kernels know only parts, so a new format is a new reader, and a new family is at most one new part.
Parts describe tensors by file and key; nothing is loaded here. There may be 20,000 of them, which the garbage collector
is told to leave alone: no cycle can run through them.
"""

from math import prod

import msgspec

from adapters_store.ref import Kind

BYTES_PER_ELEMENT = {"F32": 4, "F16": 2, "BF16": 2}


class TensorRef(msgspec.Struct, frozen=True, gc=False):
    """One tensor of a safetensors file. `file` is its name in the adapter's directory, `dtype` as in the header, and
    its bytes begin at `offset` of the file."""

    file: str
    key: str
    shape: tuple[int, ...]
    dtype: str
    offset: int = 0

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * BYTES_PER_ELEMENT[self.dtype]


class SourceFile(msgspec.Struct, frozen=True, gc=False):
    """A file as it was verified, so that a later change is noticed before its bytes are used.

    `path` is absolute and free of links: for a hub cache the blob, not the snapshot's link. `sha256` in hexadecimal.
    """

    file: str
    path: str
    size: int
    sha256: str


class LowRank(msgspec.Struct, frozen=True, tag="low_rank", gc=False):
    """y += scale * B(A x) on one linear. a: [rank, in], b: [out, rank]."""

    module: str
    a: TensorRef
    b: TensorRef
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


class ExpertReplacement(msgspec.Struct, frozen=True, tag="expert_replacement", gc=False):
    """The token uses this expert instead of the base's. gate, up: [I, H], down: [H, I].

    `gate_up` has two tensors (gate, up), or one that is already [2I, H].
    """

    layer: int
    expert: int
    gate_up: tuple[TensorRef, ...]
    down: TensorRef


Part = LowRank | ExpertReplacement


class AdapterPackage(msgspec.Struct, frozen=True):
    """A verified adapter on disk: everything needed to load it, and to say what it is.

    `declared_base` is the base model that the adapter's own files name, cleaned; None where they name none.
    """

    kind: Kind
    path: str
    revision: str
    files: tuple[SourceFile, ...]
    parts: tuple[Part, ...]
    declared_base: str | None = None

    @property
    def num_elements(self) -> int:
        """Elements that a device holds for this adapter."""
        return sum(tensor.num_elements for part in self.parts for tensor in tensors_of(part))

    @property
    def file_bytes(self) -> int:
        return sum(file.size for file in self.files)


def tensors_of(part: Part) -> tuple[TensorRef, ...]:
    match part:
        case LowRank(a=a, b=b):
            return (a, b)
        case ExpertReplacement(gate_up=gate_up, down=down):
            return (*gate_up, down)


def describe(package: AdapterPackage) -> dict[str, object]:
    """What was bound, for people: linears with rank and scale, or tuned experts by layer."""
    low_rank = [part for part in package.parts if isinstance(part, LowRank)]
    experts = [part for part in package.parts if isinstance(part, ExpertReplacement)]
    described: dict[str, object] = {"bound_tensors": sum(len(tensors_of(part)) for part in package.parts)}
    if low_rank:
        described["linears"] = {part.module: {"rank": part.rank, "scale": part.scale} for part in low_rank}
    if experts:
        by_layer: dict[str, list[int]] = {}
        for part in sorted(experts, key=lambda part: (part.layer, part.expert)):
            by_layer.setdefault(str(part.layer), []).append(part.expert)
        described["experts"] = by_layer
    return described
