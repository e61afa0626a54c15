"""The base model that an adapter says it was trained on, against what this server's base is known as.

Names prove nothing: anybody may call a directory anything, and the same weights have many names. So a difference is
told, and refused only where the operator asks for that.
"""

import json
import os
import re
from collections.abc import Iterable

from adapters_store.errors import clean

_MAX_BYTES = 200
# `models--org--Name` is how a hub cache spells org/Name; the directory below it is called by a hash
_HUB_CACHE = re.compile(r"models--([^/]+)")
_QUANTISED = re.compile(
    r"(?<![a-z0-9])(bnb|[48][-_]?bits?|nf4|(?:nv|mx)?fp[48]|int[48]|w[48]a(8|16)|gptq|awq|gguf|exl[23]|hqq|aqlm|qlora|q[48]_[01k])"
    r"(?![a-z0-9])"
)
# initialisations that move a part of the base's weights into the adapter, and publish what is left as a base
_RESIDUAL = re.compile(r"(?<![a-z])(pissa|loftq|olora|corda|lora[-_]?ga|residual)(?![a-z])")


def declared(value: object) -> str | None:
    """A base model's name out of a configuration, as it may be shown; None where there is none."""
    return (clean(value.strip(), _MAX_BYTES) or None) if isinstance(value, str) else None


def names_of_base(model_dir: str) -> list[str]:
    """What the model in this directory calls itself: by the directory (in a hub cache by the hub's name), and by the
    `_name_or_path` of its configuration. Of a path only what names the model is kept: no place on this machine."""
    names = [_name_of_path(os.path.realpath(model_dir))]
    try:
        with open(os.path.join(model_dir, "config.json"), "rb") as file:
            own = declared(json.load(file).get("_name_or_path"))
    except (OSError, ValueError, AttributeError):  # the engine says what is wrong with it
        own = None
    if own is not None:
        names.append(_name_of_path(own) if own.startswith("/") else own)
    return names


def _name_of_path(path: str) -> str:
    hub = _HUB_CACHE.findall(path)
    return hub[-1].replace("--", "/") if hub else os.path.basename(path.rstrip("/"))


def is_known(name: str, known: Iterable[str]) -> bool:
    """Whether two names can mean the same model: case and the owner's or directory's name do not count."""
    return not _short_names(name).isdisjoint(short for other in known for short in _short_names(other))


def remarks(name: str | None, known: Iterable[str]) -> list[str]:
    """What the person who serves this adapter should know of its declared base, in sentences; none if all is well."""
    if name is None:
        return []
    told: list[str] = []
    known = tuple(known)
    if not is_known(name, known):
        told.append(f"{difference(name, known)} The shapes fit, which other models' may too.")
    if _QUANTISED.search(name.casefold()):
        told.append(
            f"{name!r} names quantised weights: the adapter was trained against those and is served on this base's own."
        )
    if _RESIDUAL.search(name.casefold()):
        told.append(
            f"{name!r} names a base whose weights the initialisation changed (PiSSA, LoftQ, OLoRA, …): the adapter "
            "belongs to those weights only. Convert it with PEFT's path_initial_model_for_weight_conversion."
        )
    return told


def difference(name: str, known: Iterable[str]) -> str:
    names = ", ".join(dict.fromkeys(repr(clean(other, _MAX_BYTES)) for other in known))
    return f"The adapter says that it was trained on {name!r}; this server's base is known as {names}."


def _short_names(name: str) -> set[str]:
    """What a name may be called for short: its last step, and the model of a hub cache's directory."""
    path = name.casefold().replace("\\", "/").rstrip("/")
    hub = {match.rpartition("--")[2] for match in _HUB_CACHE.findall(path)}
    return {path.rpartition("/")[2]} | hub
