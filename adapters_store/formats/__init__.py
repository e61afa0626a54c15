"""Adapter formats: one reader a file, chosen by what lies in the directory.

A reader turns files into canonical parts and holds to the coverage contract: every tensor binds to a module of the base
with the right shape, or the adapter is refused with the list. Nothing is ignored in silence.
"""

import hashlib

from adapters_store.base_spec import BaseSpec
from adapters_store.errors import InvalidAdapter, shown
from adapters_store.files import Folder
from adapters_store.formats import esft, peft_config, peft_lora
from adapters_store.formats.reading import Reading
from adapters_store.parts import AdapterPackage
from adapters_store.room import Room
from adapters_store.safetensors_file import hash_and_check

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def read_adapter(folder: Folder, base: BaseSpec, room: Room | None = None) -> AdapterPackage:
    """Read, verify and bind the adapter. Raises AdapterError; reads every byte once, the weights only if all fits."""
    reading = _read(folder, base)
    if room is not None:
        room.check(reading.parts)
    files = tuple(hash_and_check(weights) for weights in reading.weights)
    content = f"{reading.kind}:{';'.join(file.sha256 for file in files)}:{reading.meaning}"
    revision = hashlib.sha256(content.encode()).hexdigest()
    return AdapterPackage(reading.kind, folder.path, revision, files, reading.parts, reading.declared_base)


def _read(folder: Folder, base: BaseSpec) -> Reading:
    if peft_config.CONFIG in folder.names:
        return peft_lora.read(folder, base)
    esft.refuse_a_rank_of_many(folder)
    if esft.looks_like_esft(folder):
        return esft.read(folder, base)
    pickles = [name for name in folder.names if name.endswith(_PICKLES)]
    if pickles:
        raise InvalidAdapter(f"{shown(pickles[0])} is a pickle, which is never opened; save the adapter as safetensors")
    raise InvalidAdapter(
        f"{shown(folder.name)!r} holds no adapter: neither adapter_config.json (PEFT) nor expert_cfg.json or expert "
        "weights (ESFT)"
    )
