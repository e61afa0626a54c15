"""Reading safetensors files without trusting them, without the library and without torch.

The library opens names and maps files: a name can change between two looks, and a mapped file that is cut short kills
the process. What it checks of a header is little, and checked here, together with what it accepts and a server must
not: duplicate keys (two parsers see two files), a great many empty tensors, megabytes of metadata, NaN weights.
`tests/adapters_store/test_safetensors_file.py` holds this reader to the library's verdict. Pickle formats are never
opened at all.
"""

import hashlib
from collections.abc import Collection
from typing import Any

import msgspec
import numpy as np

from adapters_store.errors import CoverageError, InvalidAdapter, shown
from adapters_store.files import OpenFile
from adapters_store.limits import Limits
from adapters_store.parts import BYTES_PER_ELEMENT, SourceFile, TensorRef
from adapters_store.safetensors_header import SAVE_AGAIN, check_filled, described, entries, read_raw

_MAX_KEY = 512  # characters: keys are matched against patterns
MAX_WEIGHT = 65_504  # the largest float16: what is trained stays far below, and products of larger ones overflow
_CHUNK_BYTES = 4 << 20
# how a dtype's bits are read; those of |w|; those of the largest weight that is served; the first that is not finite
_BITS: dict[str, tuple[type[np.unsignedinteger[Any]], int, int, int]] = {
    "F32": (np.uint32, 0x7FFF_FFFF, 0x477F_E000, 0x7F80_0000),
    "F16": (np.uint16, 0x7FFF, 0x7BFF, 0x7C00),
    "BF16": (np.uint16, 0x7FFF, 0x477F, 0x7F80),
}


class Weights(msgspec.Struct, frozen=True):
    """A file whose header was read. `raw_header` is what was parsed, with the eight bytes that give its length;
    `tensors` are in the order of their bytes, which fill the rest of the file without a hole."""

    file: OpenFile
    raw_header: bytes
    tensors: tuple[TensorRef, ...]


def read_header(file: OpenFile, limits: Limits) -> Weights:
    """The tensors of a safetensors file. Raises InvalidAdapter; reads the header only."""
    raw = read_raw(file, limits.header_bytes, "for this base: save the adapter's own tensors only")
    header = entries(raw, file.name)
    limits.check_count(len(header), shown(file.name))
    tensors = sorted((_tensor(file, key, entry, len(raw)) for key, entry in header.items()), key=lambda it: it.offset)
    check_filled(file, len(raw), tensors)
    return Weights(file, raw, tuple(tensors))


def _tensor(file: OpenFile, key: str, entry: object, data_begin: int) -> TensorRef:
    what = f"{shown(key)} in {shown(file.name)}"
    if len(key) > _MAX_KEY:
        raise InvalidAdapter(
            f"{what} has a name of {len(key):,} characters; at most {_MAX_KEY} are served, and a module's name is far "
            "shorter: rename it"
        )
    dtype, shape, (begin, end) = described(entry, what)
    if dtype not in BYTES_PER_ELEMENT:
        named = f"dtype {dtype}" if dtype in _OTHER_DTYPES else "an unknown dtype"
        raise InvalidAdapter(
            f"{what} has {named}; served are {', '.join(BYTES_PER_ELEMENT)}: convert the adapter to one of these "
            "(tensor.float() in torch) and save it again"
        )
    if not shape or min(shape) == 0:
        raise InvalidAdapter(
            f"{what} has the empty shape {list(shape)}: a DeepSpeed ZeRO-3 run that was saved before its weights were "
            "gathered looks so; save with stage3_gather_16bit_weights_on_model_save, or rebuild it with zero_to_fp32.py"
        )
    tensor = TensorRef(file.name, key, shape, dtype, data_begin + begin)
    if tensor.num_bytes != end - begin:
        raise InvalidAdapter(f"{what} has {end - begin:,} bytes; its shape needs {tensor.num_bytes:,}; {SAVE_AGAIN}")
    return tensor


_OTHER_DTYPES = ("F64", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")


def hash_and_check(weights: Weights, idle: Collection[str] = ()) -> SourceFile:
    """The file with its sha256, having seen in the same pass that every weight is finite and at most MAX_WEIGHT, and
    zero in the tensors that `idle` names.

    The hash is of the header that was parsed and of the bytes that were checked, whatever the file holds meanwhile.
    """
    file, digest = weights.file, hashlib.sha256(weights.raw_header)
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    for tensor in weights.tensors:
        for done in range(0, tensor.num_bytes, _CHUNK_BYTES):
            chunk = buffer[: min(_CHUNK_BYTES, tensor.num_bytes - done)]
            file.read_into(tensor.offset + done, chunk)
            digest.update(chunk)
            _check_weights(tensor, chunk, is_idle=tensor.key in idle)
    return SourceFile(file.name, file.path, file.size, digest.hexdigest())


def _check_weights(tensor: TensorRef, chunk: memoryview, is_idle: bool) -> None:
    """As bits, magnitudes are in the order of their values, with infinity above and NaN beyond that."""
    view, magnitude, largest, infinite = _BITS[tensor.dtype]
    bits = int((np.frombuffer(chunk, view) & magnitude).max())
    if bits >= infinite:
        raise InvalidAdapter(
            f"{shown(tensor.key)} holds NaN or infinite weights: training diverged; take an earlier checkpoint"
        )
    if bits > 0 and is_idle:
        raise CoverageError(
            f"{shown(tensor.key)} acts on a part that is not served (a multimodal model's part for images or "
            "sound) and is not zero: train with target_modules that match the text part only, or merge the adapter "
            "into its base"
        )
    if bits > largest:
        raise InvalidAdapter(
            f"{shown(tensor.key)} holds a weight above {MAX_WEIGHT:,} in size, the largest float16; training that does "
            "not diverge stays far below: take an earlier checkpoint"
        )
