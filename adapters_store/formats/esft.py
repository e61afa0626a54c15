"""ESFT (arXiv 2407.01906): whole experts of a MoE base, tuned and stored as absolute weights.

    expert_cfg.json                   {"experts": {"1": [35, 22]}, "shared_experts": bool, "non_expert_modules": bool}
    model-00001-of-000001.safetensors [model.]layers.{L}.mlp.experts.{E}.{gate,up,down}_proj.weight
    model.safetensors.index.json      optional

The key prefix `model.` is absent on the hub's first checkpoints and present in those that the trainer writes today.
The trainer may leave expert_cfg.json out; the tuned experts are then read off the tensor names. Expert lists are in
order of relevance, not of id. Mixtral's names (block_sparse_moe, w1, w3, w2) are the same three matrices.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

from adapters_store.base_spec import BaseSpec, ExpertStack
from adapters_store.errors import CoverageError, InvalidAdapter, UnsupportedAdapter
from adapters_store.parts import AdapterPackage, ExpertReplacement, SourceFile, TensorRef
from adapters_store.safetensors_file import hash_and_check_finite, read_header, read_json

CONFIG = "expert_cfg.json"
INDEX = "model.safetensors.index.json"
_KEY = re.compile(
    r"^(?:model\.)?layers\.(?P<layer>\d{1,6})\.(?:mlp|block_sparse_moe)\.experts\.(?P<expert>\d{1,6})\."
    r"(?P<matrix>gate_proj|up_proj|down_proj|w1|w3|w2)\.weight$"
)
_MATRIX = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
_MAX_INDEX_BYTES = 16 << 20

ExpertKey = tuple[int, int]  # (layer, expert)


def looks_like_esft(directory: Path) -> bool:
    """expert_cfg.json, or safetensors whose first tensors are single experts (a copied config.json proves nothing)."""
    if (directory / CONFIG).is_file():
        return True
    files = _weight_files(directory)
    return bool(files) and any(_KEY.match(key) for key in read_header(directory, files[0]))


def read(directory: Path, base: BaseSpec) -> AdapterPackage:
    files = _weight_files(directory)
    if not files:
        raise InvalidAdapter("there are no .safetensors files beside expert_cfg.json")
    tensors = _read_shards(directory, files)
    tuned = _tuned_experts(directory)
    parts = _bind(tensors, tuned, base)
    hashes: list[str] = []
    sources: list[SourceFile] = []
    for name in files:
        file_hash, source = hash_and_check_finite(directory, name)
        hashes.append(file_hash)
        sources.append(source)
    revision = hashlib.sha256(f"esft:{';'.join(hashes)}".encode()).hexdigest()
    return AdapterPackage("esft", str(directory), revision, tuple(sources), tuple(parts))


def _weight_files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("*.safetensors"))


def _read_shards(directory: Path, files: list[str]) -> dict[str, TensorRef]:
    tensors: dict[str, TensorRef] = {}
    for name in files:
        for key, tensor in read_header(directory, name).items():
            if key in tensors:
                raise InvalidAdapter(f"{key[:200]} is in both {tensors[key].file} and {name}")
            tensors[key] = tensor
    if (directory / INDEX).exists():
        weight_map = read_json(directory, INDEX, _MAX_INDEX_BYTES).get("weight_map")
        if not isinstance(weight_map, dict):
            raise InvalidAdapter(f"{INDEX} has no weight_map")
        for key, name in weight_map.items():
            if key not in tensors or tensors[key].file != name:
                raise InvalidAdapter(f"{INDEX} places {key[:200]} in {str(name)[:200]}, where it is not")
    return tensors


def _tuned_experts(directory: Path) -> set[ExpertKey] | None:
    """The (layer, expert) pairs that expert_cfg.json lists, or None where there is no such file."""
    if not (directory / CONFIG).is_file():
        return None
    config = read_json(directory, CONFIG)
    for flag, what in (("shared_experts", "shared experts"), ("non_expert_modules", "modules outside the experts")):
        if config.get(flag) not in (None, False):
            raise UnsupportedAdapter(f"{flag} is {config[flag]!r}: an adapter that tunes {what} is not served")
    unknown = sorted(set(config) - {"experts", "shared_experts", "non_expert_modules"})
    if unknown:
        raise UnsupportedAdapter(f"{CONFIG} has the unknown key {unknown[0][:200]!r}")
    experts = config.get("experts")
    if not isinstance(experts, dict) or not experts:
        raise InvalidAdapter(f"{CONFIG} must map layers to lists of expert ids under 'experts'")
    return {(layer, expert) for key, ids in experts.items() for layer, expert in _layer_entries(key, ids)}


def _layer_entries(key: str, ids: Any) -> list[ExpertKey]:
    sound = isinstance(ids, list) and all(type(expert) is int and expert >= 0 for expert in ids)
    if not key.isdecimal() or not sound:
        raise InvalidAdapter(f"{CONFIG}: layer {key[:80]!r} must be a number with a list of expert ids")
    if len(set(ids)) != len(ids):
        raise InvalidAdapter(f"{CONFIG}: layer {key} lists an expert twice")
    return [(int(key), expert) for expert in ids]


def _bind(tensors: dict[str, TensorRef], tuned: set[ExpertKey] | None, base: BaseSpec) -> list[ExpertReplacement]:
    if not base.experts:
        raise UnsupportedAdapter(f"an ESFT adapter needs a mixture-of-experts base; this one is {base.model_type}")
    problems: list[str] = []
    found: dict[ExpertKey, dict[str, TensorRef]] = {}
    for key, tensor in tensors.items():
        match = _KEY.match(key)
        if match is None:
            problems.append(f"{key[:200]}: not an expert's gate, up or down matrix")
            continue
        where, matrix = (int(match["layer"]), int(match["expert"])), _MATRIX[match["matrix"]]
        problem = _tensor_problem(where, matrix, tensor, tuned, base)
        if problem is None and matrix in found.setdefault(where, {}):
            problem = f"a second {matrix} matrix for this expert"
        if problem is not None:
            problems.append(f"{key[:200]}: {problem}")
        else:
            found[where][matrix] = tensor
    for layer, expert in sorted((tuned or set()) | set(found)):
        missing = [matrix for matrix in ("gate", "up", "down") if matrix not in found.get((layer, expert), {})]
        if missing:
            problems.append(f"layer {layer} expert {expert}: {', '.join(missing)} missing or unusable")
    if problems:
        raise CoverageError(problems, bound=sum(len(matrices) for matrices in found.values()))
    return [
        ExpertReplacement(layer, expert, (matrices["gate"], matrices["up"]), matrices["down"])
        for (layer, expert), matrices in sorted(found.items())
    ]


def _tensor_problem(
    where: ExpertKey, matrix: str, tensor: TensorRef, tuned: set[ExpertKey] | None, base: BaseSpec
) -> str | None:
    layer, expert = where
    stack: ExpertStack | None = base.experts.get(layer)
    if stack is None:
        return f"layer {layer} of the base has no routed experts"
    if stack.layout != "gated":
        return f"experts of {base.model_type} have another layout than ESFT's gate, up and down"
    if expert >= stack.num_experts:
        return f"the base has {stack.num_experts} experts in layer {layer}"
    if tuned is not None and where not in tuned:
        return f"{CONFIG} does not list expert {expert} of layer {layer}"
    hidden, intermediate = stack.hidden_size, stack.intermediate_size
    expected = (hidden, intermediate) if matrix == "down" else (intermediate, hidden)
    if tensor.shape != expected:
        return f"shape {list(tensor.shape)}, expected {list(expected)}"
    return None
