"""Which base model a directory holds: by its weights (slow, certain), or by a look at them (fast, for a name).

Adapters belong to weights, not to the name of a directory or to the way in which weights were cut into files. So

    base_id      = sha256 over the tensors in order of name: "name dtype shape sha256(bytes)", a line each
    fingerprint  = sha256 of config.json without what Transformers writes about itself, and of each file's size, header
                   and a few blocks of its data

Two models of one id compute the same. Two of one fingerprint most likely do: where it matters, ask for the id.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import Any

import msgspec

from adapters_store.errors import BaseUnreadable, InvalidAdapter, shown
from adapters_store.files import OpenFile
from adapters_store.json_file import parse_json
from adapters_store.safetensors_header import SAVE_AGAIN, check_filled, described, entries, read_raw

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_MAX_HEADER_BYTES = 100 << 20  # the format's own limit
_MAX_JSON_BYTES = 64 << 20  # an index names every tensor of 128 experts in 60 layers with 3 MB
_CHUNK_BYTES = 4 << 20
_MAX_THREADS = 8  # disks are not faster than eight cores hash
_BLOCK_BYTES, _BLOCKS, _FEWEST_BLOCKS = 4096, 256, 4  # of all files together; of each
# what a copy or another version of Transformers changes; how weights are stored the files say themselves
_INCIDENTAL = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16,
    "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I8": 8, "U8": 8,
    "BOOL": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip

# bytes done, bytes in all
OnProgress = Callable[[int, int], None]


class _Stored(msgspec.Struct, frozen=True, gc=False):
    """A tensor of any type, in the file of that number."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    offset: int
    num_bytes: int


def base_id(model_dir: Path, on_progress: OnProgress = lambda done, total: None) -> str:
    """ "sha256:…" of the weights in a Transformers directory: the same however they are cut into files and in whatever
    order, another if one bit of one tensor is another.

    Reads every byte once, in constant memory. Raises BaseUnreadable.
    """
    with _weights_of(model_dir) as files:
        tensors = _all_tensors(model_dir, files)
        total = sum(tensor.num_bytes for tensor in tensors)
        lines: dict[str, str] = {}
        done = 0
        with _pool() as pool:
            for tensor, digest in zip(tensors, pool.map(lambda it: _digest(files, it), tensors), strict=True):
                lines[tensor.key] = json.dumps([tensor.key, tensor.dtype, tensor.shape, digest])
                done += tensor.num_bytes
                on_progress(done, total)
    whole = "\n".join(lines[key] for key in sorted(lines))
    return f"sha256:{hashlib.sha256(whole.encode()).hexdigest()}"


def fingerprint(model_dir: Path) -> str:
    """64 hexadecimal digits, from configuration, headers and samples of the weights: milliseconds. The same wherever
    the directory lies and whatever its files are called. Raises BaseUnreadable."""
    with _weights_of(model_dir) as files:
        count = max(_FEWEST_BLOCKS, _BLOCKS // len(files))
        seen = sorted(_sampled(file, count) for file in files)
    config = json.dumps(_essential(_config(model_dir)), sort_keys=True)
    return hashlib.sha256("\n".join((config, *seen)).encode()).hexdigest()


@contextmanager
def _weights_of(model_dir: Path) -> Iterator[list[OpenFile]]:
    """The files that Transformers would load, open, in order of name. Links are followed: the directory is the
    operator's own."""
    try:
        with ExitStack() as closing:
            files: list[OpenFile] = []
            for name in _names(model_dir):
                descriptor = os.open(model_dir / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                closing.callback(os.close, descriptor)
                files.append(OpenFile(descriptor, name, str(model_dir / name)))
                if not files[-1].is_regular:
                    raise BaseUnreadable(f"{shown(name)} of the base model is not a regular file")
            yield files
    except InvalidAdapter as error:  # the readers' own, who know adapters
        raise BaseUnreadable(f"the base model cannot be read: {error}") from None
    except OSError as error:
        name = shown(os.path.basename(str(error.filename or model_dir)))
        raise BaseUnreadable(f"{name} of the base model cannot be read: {error.strerror}") from None


def _names(model_dir: Path) -> list[str]:
    present = sorted(os.listdir(model_dir))
    if WHOLE in present:
        return [WHOLE]
    if INDEX in present:
        return sorted(set(_index(model_dir).values()))
    names = [name for name in present if name.endswith(".safetensors")]
    if not names:
        pickle = next((name for name in present if name.endswith(_PICKLES)), None)
        found = f"only {shown(pickle)}, a pickle, which is never opened" if pickle else "no weights"
        raise BaseUnreadable(
            f"{shown(model_dir.name)!r} holds {found}: give a directory with .safetensors files; "
            "AutoModelForCausalLM.from_pretrained(…).save_pretrained(…) writes them"
        )
    return names


def _index(model_dir: Path) -> dict[str, str]:
    """The file of each tensor."""
    index = parse_json(_small(model_dir / INDEX), INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise BaseUnreadable(f"{INDEX} has no weight_map: copy or download it again")
    for name in index.values():
        if not isinstance(name, str) or os.path.basename(name) != name or not name.endswith(".safetensors"):
            raise BaseUnreadable(f"{INDEX} places a tensor in {shown(str(name))!r}, which is no safetensors file there")
    missing = sorted({name for name in index.values() if not (model_dir / name).exists()})
    if missing:
        raise BaseUnreadable(
            f"{INDEX} names {len(missing)} files that are missing ({shown(missing[0])}): copy or download them"
        )
    return index


def _all_tensors(model_dir: Path, files: Sequence[OpenFile]) -> list[_Stored]:
    """File by file in the order of their bytes."""
    found: dict[str, _Stored] = {}
    for number, file in enumerate(files):
        for tensor in _tensors(number, file):
            if tensor.key in found:
                first = files[found[tensor.key].file].name
                raise BaseUnreadable(
                    f"{shown(tensor.key)} is in both {shown(first)} and {shown(file.name)}: remove the file that does "
                    "not belong to the model"
                )
            found[tensor.key] = tensor
    if [file.name for file in files] != [WHOLE] and (model_dir / INDEX).exists():
        for key, name in _index(model_dir).items():
            if key not in found or files[found[key].file].name != name:
                raise BaseUnreadable(
                    f"{INDEX} places {shown(key)} in {shown(name)}, where it is not: download it again"
                )
    return list(found.values())


def _tensors(number: int, file: OpenFile) -> list[_Stored]:
    raw = read_raw(file, _MAX_HEADER_BYTES, "by any reader of safetensors")
    tensors: list[_Stored] = []
    for key, entry in entries(raw, file.name).items():
        what = f"{shown(key)} in {shown(file.name)}"
        dtype, shape, (begin, end) = described(entry, what)
        if dtype not in _BITS or prod(shape) * _BITS[dtype] != (end - begin) * 8:
            raise InvalidAdapter(f"{what} has {end - begin:,} bytes, which {dtype} {list(shape)} has not; {SAVE_AGAIN}")
        tensors.append(_Stored(key, dtype, shape, number, len(raw) + begin, end - begin))
    tensors.sort(key=lambda it: (it.offset, it.num_bytes))  # empty ones lie nowhere, before what begins there
    check_filled(file, len(raw), tensors)
    return tensors


@contextmanager
def _pool() -> Iterator[ThreadPoolExecutor]:
    """Reading and hashing let other threads run. Who is interrupted does not wait for the rest of the model."""
    pool = ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), _MAX_THREADS))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _digest(files: Sequence[OpenFile], tensor: _Stored) -> str:
    digest, size = hashlib.sha256(), tensor.num_bytes
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, size)))
    for done in range(0, size, _CHUNK_BYTES):
        chunk = buffer[: size - done]
        files[tensor.file].read_into(tensor.offset + done, chunk)
        digest.update(chunk)
    return digest.hexdigest()


def _sampled(file: OpenFile, count: int) -> str:
    """Digest of size, header and `count` blocks, which are spread over the data."""
    raw = read_raw(file, _MAX_HEADER_BYTES, "by any reader of safetensors")
    digest = hashlib.sha256(file.size.to_bytes(8, "little") + raw)
    last = max(file.size - _BLOCK_BYTES, len(raw))
    for number in range(count):
        begin = len(raw) + (last - len(raw)) * number // (count - 1)
        digest.update(file.read(begin, min(_BLOCK_BYTES, file.size - begin)))
    return digest.hexdigest()


def _config(model_dir: Path) -> Any:
    try:
        return json.loads(_small(model_dir / "config.json"))
    except (ValueError, RecursionError):
        raise BaseUnreadable("config.json of the base model is no JSON: copy or download it again") from None


def _essential(config: Any) -> Any:
    """Without what is incidental, at any depth: models of several modalities have a configuration in theirs."""
    if isinstance(config, dict):
        return {key: _essential(value) for key, value in config.items() if key not in _INCIDENTAL}
    return [_essential(item) for item in config] if isinstance(config, list) else config


def _small(file: Path) -> bytes:
    try:
        if file.stat().st_size > _MAX_JSON_BYTES:
            raise BaseUnreadable(f"{file.name} of the base model has more than {_MAX_JSON_BYTES:,} bytes")
        return file.read_bytes()
    except OSError as error:
        raise BaseUnreadable(f"{file.name} of the base model cannot be read: {error.strerror}") from None
