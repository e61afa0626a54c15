"""Reading adapter files without trusting them, and without torch.

safetensors itself refuses broken headers, but accepts some things that a server must not: duplicate keys (two parsers
see two files), huge numbers of empty tensors, 50 MB of metadata, NaN weights. Those are refused here, before the
library opens the file. Pickle formats are never opened at all.
"""

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from adapters_store.errors import InvalidAdapter
from adapters_store.parts import BYTES_PER_ELEMENT, SourceFile, TensorRef

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 100_000
MAX_CONFIG_BYTES = 1 << 20
_CHUNK_BYTES = 16 << 20
# all exponent bits set means Inf or NaN: (unsigned view, mask)
_EXPONENT = {"F32": (np.uint32, 0x7F80_0000), "F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80)}


def resolve_file(directory: Path, name: str) -> Path:
    """The real path of a regular file of the adapter. Where it may lie is the catalogue's to decide."""
    path = directory / name
    if not path.exists():
        raise InvalidAdapter(f"{name} is missing")
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise InvalidAdapter(f"{name} is not a regular file")
    return path.resolve()


def read_json(directory: Path, name: str, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """A JSON object from a small file; duplicate keys, NaN and anything but an object are refused."""
    path = resolve_file(directory, name)
    size = path.stat().st_size
    if size > limit:
        raise InvalidAdapter(f"{name} has {size:,} bytes; at most {limit:,} are read")
    return parse_json(path.read_bytes(), name)


def parse_json(raw: bytes, name: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise InvalidAdapter(f"{name} has the key {key[:200]!r} twice")
            found[key] = value
        return found

    def no_constant(token: str) -> Any:
        raise InvalidAdapter(f"{name} holds {token}, which is not JSON")

    try:
        value = json.loads(raw, object_pairs_hook=unique, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidAdapter(f"{name} is not valid JSON ({type(error).__name__})") from None
    if not isinstance(value, dict):
        raise InvalidAdapter(f"{name} must hold a JSON object, not {type(value).__name__}")
    return value


def read_header(directory: Path, name: str) -> dict[str, TensorRef]:
    """Every tensor of a safetensors file by key. Raises InvalidAdapter; reads the header only."""
    path = resolve_file(directory, name)
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > path.stat().st_size - 8:
            raise InvalidAdapter(f"{name} is not a safetensors file: its header does not fit in it")
        if length > MAX_HEADER_BYTES:
            raise InvalidAdapter(f"{name} has a header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} are read")
        header = parse_json(file.read(length), f"the header of {name}")
    header.pop("__metadata__", None)
    if not 0 < len(header) <= MAX_TENSORS:
        raise InvalidAdapter(f"{name} holds {len(header):,} tensors; 1 to {MAX_TENSORS:,} are served")
    try:
        with safe_open(path, framework="numpy"):  # offsets, overlaps, holes and sizes are the library's to check
            pass
    except (SafetensorError, OSError) as error:
        raise InvalidAdapter(f"{name} is not a sound safetensors file: {str(error)[:200]}") from None
    return {key: _tensor_ref(name, key, entry) for key, entry in header.items()}


def _tensor_ref(file: str, key: str, entry: dict[str, Any]) -> TensorRef:
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    if dtype not in BYTES_PER_ELEMENT:
        raise InvalidAdapter(f"{key[:200]} has dtype {dtype}; served are {', '.join(BYTES_PER_ELEMENT)}")
    if not shape or min(shape) == 0:
        raise InvalidAdapter(f"{key[:200]} has the empty shape {list(shape)}")
    return TensorRef(file=file, key=key, shape=shape, dtype=dtype)


def hash_and_check_finite(directory: Path, name: str) -> tuple[str, SourceFile]:
    """sha256 of the whole file, and a check in the same pass that no weight is NaN or infinite."""
    path = resolve_file(directory, name)
    status = path.stat()
    digest = hashlib.sha256()
    with path.open("rb") as file:
        prefix = file.read(8)
        raw_header = file.read(int.from_bytes(prefix, "little"))
        digest.update(prefix + raw_header)
        entries = parse_json(raw_header, f"the header of {name}")
        entries.pop("__metadata__", None)
        for key, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"][0]):
            view, mask = _EXPONENT[entry["dtype"]]
            begin, end = entry["data_offsets"]
            for offset in range(begin, end, _CHUNK_BYTES):
                chunk = file.read(min(_CHUNK_BYTES, end - offset))
                digest.update(chunk)
                bits = np.frombuffer(chunk, dtype=view)
                if ((bits & mask) == mask).any():
                    raise InvalidAdapter(f"{key[:200]} holds NaN or infinite weights")
    return digest.hexdigest(), SourceFile(file=name, size=status.st_size, mtime_ns=status.st_mtime_ns)
