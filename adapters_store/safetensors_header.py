"""The header of a safetensors file, whoever's it is: what of it holds for adapters and bases alike.

    8 bytes: its length | {"key": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, …} | the tensors' bytes

Tensors fill what follows without a hole, so that every byte of the file is somebody's. Raises InvalidAdapter.
"""

from collections.abc import Iterable
from typing import Any, Protocol

from adapters_store.errors import InvalidAdapter, shown
from adapters_store.files import OpenFile
from adapters_store.json_file import parse_json

_MAX_DIMENSIONS = 8
_COPY_AGAIN = "it may have been cut short: copy or download it again"
SAVE_AGAIN = "save it again with the safetensors library"


class Placed(Protocol):
    """A tensor of the file; `offset` counts from the file's first byte."""

    @property
    def key(self) -> str: ...
    @property
    def offset(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...


def read_raw(file: OpenFile, max_bytes: int, remedy: str) -> bytes:
    """The header as it is, behind the eight bytes that give its length. `remedy` goes on after "are read"."""
    name = shown(file.name)
    length = int.from_bytes(file.read(0, 8), "little") if file.size >= 8 else -1
    if not 0 <= length <= file.size - 8:
        raise InvalidAdapter(f"{name} is not a safetensors file: its header does not fit in it; {_COPY_AGAIN}")
    if length > max_bytes:
        raise InvalidAdapter(f"{name} has a header of {length:,} bytes; at most {max_bytes:,} are read {remedy}")
    return file.read(0, 8 + length)


def entries(raw: bytes, name: str) -> dict[str, Any]:
    """What it says of each tensor, unseen. The metadata may say anything."""
    header = parse_json(raw[8:], f"the header of {shown(name)}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InvalidAdapter(f"{shown(name)} has a __metadata__ that is no object of texts; {SAVE_AGAIN}")
    return header


def described(entry: object, what: str) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """dtype ("" where it is no text), shape, and where its bytes begin and end behind the header. `what` names it."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InvalidAdapter(f"{what} is not described by dtype, shape and data_offsets; {SAVE_AGAIN}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _are_counts(shape) or len(shape) > _MAX_DIMENSIONS or not _are_counts(offsets) or len(offsets) != 2:
        raise InvalidAdapter(f"{what} has a shape or offsets that are no sizes; {SAVE_AGAIN}")
    return dtype if isinstance(dtype, str) else "", tuple(shape), (offsets[0], offsets[1])


def check_filled(file: OpenFile, data_begin: int, tensors: Iterable[Placed]) -> None:
    """That the tensors, in the order of their bytes, leave no hole and do not overlap."""
    name, end = shown(file.name), data_begin
    for tensor in tensors:
        if tensor.offset != end:
            raise InvalidAdapter(
                f"{name} is not a sound safetensors file: {shown(tensor.key)} begins at byte {tensor.offset:,}, where "
                f"{end:,} is due; {_COPY_AGAIN}"
            )
        end += tensor.num_bytes
    if end != file.size:
        raise InvalidAdapter(
            f"{name} is not a sound safetensors file: its tensors end at {end:,} of {file.size:,} bytes; {_COPY_AGAIN}"
        )


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 48 for value in values)
