"""The files of a checkpoint, looked at before anything is built from them: what is broken is said, and where."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, AutoConfig
from transformers import __version__ as transformers_version

from server.model.families import Foreign, UnsupportedModelError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_COPY_AGAIN = "copy the checkpoint again"


def read_config(model_dir: Path) -> Foreign:
    """Raises UnsupportedModelError."""
    if not (model_dir / CONFIG).is_file():
        raise UnsupportedModelError(f"{model_dir.name!r} holds no {CONFIG}, so it is not a Transformers model")
    said = _read_json(model_dir, CONFIG)
    model_type = said.get("model_type")
    if not isinstance(model_type, str):
        raise UnsupportedModelError(f"{CONFIG} of {model_dir.name!r} names no model_type, as Transformers models do")
    if model_type not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"model type {model_type!r} is not served: Transformers {transformers_version} does not know it"
        )
    try:
        return AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each configuration checks itself in its own way
        says = " ".join(str(error).split())[:300]
        raise UnsupportedModelError(f"{CONFIG} of {model_dir.name!r} is not one of {model_type}: {says}") from error


def weight_files(model_dir: Path) -> list[Path]:
    """Where Transformers looks for them, each with a header that can be read. Raises UnsupportedModelError."""
    if (model_dir / WEIGHTS).is_file():
        names = [WEIGHTS]
    elif (model_dir / INDEX).is_file():
        weight_map = _read_json(model_dir, INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(it, str) for it in weight_map.values()):
            raise UnsupportedModelError(f"{INDEX} of {model_dir.name!r} maps no names to files: {_COPY_AGAIN}")
        names = sorted(set(weight_map.values()))
    else:
        raise UnsupportedModelError(
            f"{model_dir.name!r} holds no {WEIGHTS} and no {INDEX}; other forms, pickles (.bin) among them, are never "
            "opened: save the model as safetensors"
        )
    for name in names:
        _check_header(model_dir, name)
    return [model_dir / name for name in names]


def _check_header(model_dir: Path, name: str) -> None:
    if not (model_dir / name).is_file():
        raise UnsupportedModelError(f"{INDEX} of {model_dir.name!r} names {name}, which is not there: {_COPY_AGAIN}")
    try:
        with safe_open(model_dir / name, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise UnsupportedModelError(f"{name} of {model_dir.name!r} cannot be read ({error}): {_COPY_AGAIN}") from error


def _read_json(model_dir: Path, name: str) -> dict[str, Any]:
    try:
        said = json.loads((model_dir / name).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedModelError(f"{name} of {model_dir.name!r} cannot be read ({error}): {_COPY_AGAIN}") from error
    if not isinstance(said, dict):
        raise UnsupportedModelError(f"{name} of {model_dir.name!r} is no object: {_COPY_AGAIN}")
    return said
