"""Adapter formats: one reader a file, chosen by what lies in the directory.

A reader turns files into canonical parts and holds to the coverage contract: every tensor binds to a module of the base
with the right shape, or the adapter is refused with the list. Nothing is ignored in silence.
"""

from pathlib import Path

from adapters_store.base_spec import BaseSpec
from adapters_store.errors import InvalidAdapter
from adapters_store.formats import esft, peft_lora
from adapters_store.parts import AdapterPackage

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def read_adapter(directory: Path, base: BaseSpec) -> AdapterPackage:
    """Read, verify and bind the adapter in `directory`. Raises AdapterError; reads every byte once."""
    if not directory.is_dir():
        raise InvalidAdapter(f"{directory.name!r} is not a directory")
    if (directory / "adapter_config.json").is_file():
        return peft_lora.read(directory, base)
    if esft.looks_like_esft(directory):
        return esft.read(directory, base)
    pickles = sorted(file.name for file in directory.iterdir() if file.suffix in _PICKLES)
    if pickles:
        raise InvalidAdapter(f"{pickles[0]} is a pickle, which is never opened; save the adapter as safetensors")
    raise InvalidAdapter(
        f"{directory.name!r} holds no adapter: neither adapter_config.json (PEFT) nor expert_cfg.json or expert "
        "weights (ESFT)"
    )
