"""Names of the files that an adapter may consist of, wherever they come from."""

import re

from adapters_store.errors import FileNameRefused, UnsupportedAdapter, shown

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
NAMES = frozenset({"adapter_config.json", "expert_cfg.json", "config.json", "heddle.json"})
_ENDINGS = (".safetensors", ".safetensors.index.json")


def is_adapter_file(name: str) -> bool:
    return _PLAIN.fullmatch(name) is not None and (name in NAMES or name.endswith(_ENDINGS))


def is_pickle(name: str) -> bool:
    return name.lower().endswith(PICKLES)


def check_file_name(name: str) -> None:
    """Raises UnsupportedAdapter for a pickle, FileNameRefused for any other name that is no adapter's file's."""
    if is_pickle(name):
        raise UnsupportedAdapter(f"{shown(name)!r} is a pickle, which is never opened; save as safetensors")
    if not is_adapter_file(name):
        raise FileNameRefused(
            f"{shown(name)!r} is not a file of an adapter: send {', '.join(sorted(NAMES))}, *.safetensors and "
            "*.safetensors.index.json, by their plain names"
        )
