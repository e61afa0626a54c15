"""Adapter formats: one reader a file, chosen by what lies in the directory.

A reader turns files into canonical parts and holds to the coverage contract: every tensor binds to a module of the base
with the right shape, or the adapter is refused with the list. Nothing is ignored in silence.
"""

import hashlib
from collections.abc import Collection

from adapters_store.base_spec import BaseSpec
from adapters_store.errors import InvalidAdapter, NoAdapterThere, clean, shown
from adapters_store.file_names import PICKLES
from adapters_store.files import Folder, OpenFile
from adapters_store.formats import esft, peft_config, peft_lora
from adapters_store.formats.reading import Reading
from adapters_store.manifest import FILE as MANIFEST
from adapters_store.overflow import check_outputs
from adapters_store.parts import AdapterPackage, SourceFile
from adapters_store.room import Room
from adapters_store.safetensors_file import hash_and_check
from adapters_store.store.blobs import Desk

READER = b"1"  # of packages as they are stored: with another number here they are read again from their files
_MAX_NOTES, _MAX_NOTE_BYTES = 32, 1000


def read_adapter(
    folder: Folder,
    base: BaseSpec,
    room: Room | None = None,
    ignore_keys: Collection[str] = (),
    desk: Desk | None = None,
) -> tuple[AdapterPackage, tuple[SourceFile, ...]]:
    """Read, verify and bind the adapter, without the unknown keys of its configuration that `ignore_keys` names. Raises
    AdapterError; reads every byte once for its hash, the weights only if all fits, and once more to try them.

    With a `desk` every file that was read is stored, and the second of the result; the package's files are the blobs.
    """
    reading = _read(folder, base, ignore_keys)
    if room is not None:
        room.check(reading.parts)
    files = tuple(hash_and_check(weights, reading.idle) for weights in reading.weights)
    check_outputs(reading.parts, {weights.file.name: weights.file for weights in reading.weights})
    content = f"{reading.kind}:{';'.join(file.sha256 for file in files)}:{reading.meaning}"
    revision = hashlib.sha256(content.encode()).hexdigest()
    notes = tuple(clean(note, _MAX_NOTE_BYTES) for note in reading.notes[:_MAX_NOTES])
    kept: tuple[SourceFile, ...] = ()
    if desk is not None:
        kept = tuple(_keep(file, files, desk) for file in folder.opened if file.name != MANIFEST)  # it is the name's
        weights = {it.file for it in files}
        files = tuple(it for it in kept if it.file in weights)
    return AdapterPackage(reading.kind, revision, files, reading.parts, reading.declared_base, notes), kept


def _keep(file: OpenFile, verified: tuple[SourceFile, ...], desk: Desk) -> SourceFile:
    """The bytes that were verified: of weights those that were hashed, of the others those that were parsed."""
    sha256 = next((it.sha256 for it in verified if it.file == file.name), None)
    if sha256 is not None:
        return desk.keep(file, sha256)
    raw = file.parsed if file.parsed is not None else file.read(0, file.size)
    return desk.keep(file, hashlib.sha256(raw).hexdigest(), raw)


def _read(folder: Folder, base: BaseSpec, ignore_keys: Collection[str]) -> Reading:
    if peft_config.CONFIG in folder.names:
        return peft_lora.read(folder, base, ignore_keys)
    esft.refuse_a_rank_of_many(folder)
    if esft.looks_like_esft(folder, base):
        return esft.read(folder, base, ignore_keys)
    pickles = [name for name in folder.names if name.endswith(PICKLES)]
    if pickles:
        raise InvalidAdapter(f"{shown(pickles[0])} is a pickle, which is never opened; save the adapter as safetensors")
    raise NoAdapterThere(
        f"{shown(folder.name)!r} holds no adapter: neither adapter_config.json (PEFT) nor expert_cfg.json or expert "
        "weights (ESFT): give the directory that holds these files themselves"
    )
