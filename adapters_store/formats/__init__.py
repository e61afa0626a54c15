"""Adapter formats: one reader a file, chosen by what lies in the directory.

A reader turns files into canonical parts and holds to the coverage contract: every tensor binds to a module of the base
with the right shape, or the adapter is refused with the list. Nothing is ignored in silence.
"""

import hashlib
from collections.abc import Collection

from adapters_store.base_spec import BaseSpec
from adapters_store.errors import InvalidAdapter, clean, shown
from adapters_store.files import Folder
from adapters_store.formats import esft, peft_config, peft_lora
from adapters_store.formats.reading import Reading
from adapters_store.parts import AdapterPackage
from adapters_store.room import Room
from adapters_store.safetensors_file import hash_and_check

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAX_NOTES, _MAX_NOTE_BYTES = 32, 1000


def read_adapter(
    folder: Folder, base: BaseSpec, room: Room | None = None, ignore_keys: Collection[str] = ()
) -> AdapterPackage:
    """Read, verify and bind the adapter, without the unknown keys of its configuration that `ignore_keys` names. Raises
    AdapterError; reads every byte once, the weights only if all fits."""
    reading = _read(folder, base, ignore_keys)
    if room is not None:
        room.check(reading.parts)
    files = tuple(hash_and_check(weights, reading.idle) for weights in reading.weights)
    content = f"{reading.kind}:{';'.join(file.sha256 for file in files)}:{reading.meaning}"
    revision = hashlib.sha256(content.encode()).hexdigest()
    notes = tuple(clean(note, _MAX_NOTE_BYTES) for note in reading.notes[:_MAX_NOTES])
    return AdapterPackage(reading.kind, folder.path, revision, files, reading.parts, reading.declared_base, notes)


def _read(folder: Folder, base: BaseSpec, ignore_keys: Collection[str]) -> Reading:
    if peft_config.CONFIG in folder.names:
        return peft_lora.read(folder, base, ignore_keys)
    esft.refuse_a_rank_of_many(folder)
    if esft.looks_like_esft(folder, base):
        return esft.read(folder, base, ignore_keys)
    pickles = [name for name in folder.names if name.endswith(_PICKLES)]
    if pickles:
        raise InvalidAdapter(f"{shown(pickles[0])} is a pickle, which is never opened; save the adapter as safetensors")
    raise InvalidAdapter(
        f"{shown(folder.name)!r} holds no adapter: neither adapter_config.json (PEFT) nor expert_cfg.json or expert "
        "weights (ESFT): give the directory that holds these files themselves"
    )
