"""Weights in several safetensors files, with or without the index that says which tensor is where."""

from collections.abc import Sequence

from adapters_store.errors import InvalidAdapter, shown
from adapters_store.files import Folder
from adapters_store.formats import remedies
from adapters_store.json_file import read_json
from adapters_store.limits import MAX_HEADER_BYTES, Limits
from adapters_store.parts import TensorRef
from adapters_store.safetensors_file import Weights, read_header

MAX_SHARDS = 128  # all are held open together


def read_shards(folder: Folder, files: Sequence[str], limits: Limits) -> tuple[Weights, ...]:
    """The headers of all files, which together may have no more bytes than any base's adapter in one."""
    if len(files) > MAX_SHARDS:
        raise InvalidAdapter(
            f"there are {len(files):,} .safetensors files; at most {MAX_SHARDS} are served: save the adapter in fewer"
        )
    shards: list[Weights] = []
    left = MAX_HEADER_BYTES
    for name in files:
        shards.append(read_header(folder.open(name), Limits(min(limits.header_bytes, left), limits.tensors)))
        left -= len(shards[-1].raw_header)
    return tuple(shards)


def by_key(shards: Sequence[Weights], limits: Limits) -> dict[str, TensorRef]:
    tensors: dict[str, TensorRef] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if tensor.key in tensors:
                raise InvalidAdapter(
                    f"{shown(tensor.key)} is in both {tensors[tensor.key].file} and {tensor.file}: remove the file "
                    "that does not belong to the adapter"
                )
            tensors[tensor.key] = tensor
        limits.check_count(len(tensors), "the adapter")
    return tensors


def check_index(folder: Folder, name: str, files: Sequence[str], tensors: dict[str, TensorRef], limits: Limits) -> None:
    """Where there is an index it must say of every tensor where it is, and nothing else."""
    if name not in folder.names:
        return
    index = read_json(folder, name, limits.header_bytes)
    unknown = sorted(set(index) - {"metadata", "weight_map"})
    if unknown:
        raise InvalidAdapter(f"{name} has the unknown key {shown(unknown[0])!r}; {remedies.INDEX}")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise InvalidAdapter(f"{name} has no weight_map; {remedies.INDEX}")
    for key, file in weight_map.items():
        if key not in tensors or tensors[key].file != file:
            raise InvalidAdapter(
                f"{name} places {shown(key)} in {shown(str(file))}, where it is not: copy the files that are missing, "
                "or remove the index if it is outdated"
            )
    listed = set(weight_map.values())
    for file in files:
        if file not in listed:
            raise InvalidAdapter(f"{shown(file)} is not in {name}: remove the file, or the index if it is outdated")
    missing = next((key for key in tensors if key not in weight_map), None)
    if missing is not None:
        raise InvalidAdapter(
            f"{name} does not list {shown(missing)} of {shown(tensors[missing].file)}; {remedies.INDEX}"
        )
