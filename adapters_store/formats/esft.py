"""ESFT (arXiv 2407.01906): whole experts of a MoE base, tuned and stored as absolute weights.

    expert_cfg.json                   {"experts": {"1": [35, 22]}, "shared_experts": bool, "non_expert_modules": bool}
    model-00001-of-000001.safetensors [model.]layers.{L}.mlp.experts.{E}.{gate,up,down}_proj.weight
    model.safetensors.index.json      optional

The key prefix `model.` is absent on the hub's first checkpoints and present in those that the trainer writes today.
The trainer may leave expert_cfg.json out; the tuned experts are then read off the tensor names. Expert lists are in
order of relevance, not of id. Mixtral's w1, w3 and w2 are the same three matrices, and families call the block that
holds the experts differently (mlp, block_sparse_moe, feed_forward, or nothing at all).

The trainer's expert-parallel form writes one directory a rank, each with the experts of that rank and nothing that says
so but its name: `last_checkpoint_ep0`, `last_checkpoint_ep1`, …
"""

import re
from collections.abc import Collection
from typing import Any

from adapters_store.base_spec import BaseSpec, ExpertStack
from adapters_store.declared_base import declared
from adapters_store.errors import AdapterError, InvalidAdapter, UnsupportedAdapter, coverage_error, shown
from adapters_store.files import Folder
from adapters_store.formats import remedies
from adapters_store.formats.reading import Findings, Reading
from adapters_store.formats.shards import by_key, check_index, read_shards
from adapters_store.formats.unknown_keys import check_unknown, refuse_known
from adapters_store.json_file import read_json
from adapters_store.limits import limits_of
from adapters_store.parts import ExpertReplacement, TensorRef
from adapters_store.safetensors_file import read_header

CONFIG = "expert_cfg.json"
INDEX = "model.safetensors.index.json"
_FLAGS = {"shared_experts": "shared experts", "non_expert_modules": "modules outside the experts"}
_NUMBER = r"(?:0|[1-9][0-9]{0,5})"
_KEY = re.compile(
    rf"(?:(?:model|transformer)\.)?(?:layers|blocks)\.(?P<layer>{_NUMBER})\.(?:[a-z_]{{1,40}}\.)?experts\.(?P<expert>{_NUMBER})\."
    r"(?P<matrix>gate_proj|up_proj|down_proj|w1|w3|w2)\.weight"
)
_MATRIX = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
_RANK = re.compile(r".*_ep[0-9]+", re.DOTALL)
_MERGE_RANKS = (
    f"put the safetensors files of all ranks into one directory, or beside this one's write the {CONFIG} that lists "
    "every tuned expert"
)

ExpertKey = tuple[int, int]  # (layer, expert)


def refuse_a_rank_of_many(folder: Folder) -> None:
    """One rank's experts look like a whole adapter; served as one, the others would be the base's, in silence."""
    if CONFIG not in folder.names and _RANK.fullmatch(folder.name) and _weight_files(folder):
        raise InvalidAdapter(
            f"{shown(folder.name)!r} is what one rank of an expert-parallel run writes, with that rank's experts only, "
            f"and there is no {CONFIG}: {_MERGE_RANKS}"
        )
    ranks = [name for name in folder.directories if _RANK.fullmatch(name)]
    if ranks and not _weight_files(folder):
        raise InvalidAdapter(
            f"{shown(folder.name)!r} holds {len(ranks)} directories of an expert-parallel run ({shown(ranks[0])}, …) "
            "and no weights: put the safetensors files of all ranks into this directory"
        )


def looks_like_esft(folder: Folder, base: BaseSpec) -> bool:
    """expert_cfg.json, or safetensors whose first tensors are single experts (a copied config.json proves nothing)."""
    if CONFIG in folder.names:
        return True
    files = _weight_files(folder)
    if not files:
        return False
    return any(_KEY.fullmatch(it.key) for it in read_header(folder.open(files[0]), limits_of(base)).tensors)


def read(folder: Folder, base: BaseSpec, ignore_keys: Collection[str] = ()) -> Reading:
    files, limits = _weight_files(folder), limits_of(base)
    if not files:
        raise InvalidAdapter(
            f"there are no .safetensors files beside {CONFIG}: copy them there; pickles (.bin) are never opened, save "
            "those as safetensors"
        )
    shards = read_shards(folder, files, limits)
    tensors = by_key(shards, limits)
    check_index(folder, INDEX, files, tensors, limits)
    tuned, notes = _tuned_experts(folder, ignore_keys)
    parts = _bind(tensors, tuned, base)
    return Reading("esft", shards, tuple(parts), declared_base=_declared_base(folder), notes=tuple(notes))


def _weight_files(folder: Folder) -> list[str]:
    return [name for name in folder.names if name.endswith(".safetensors")]


def _declared_base(folder: Folder) -> str | None:
    """Hub adapters carry a copy of their base's config.json. It is no part of the adapter, so a broken one is nobody's
    loss."""
    if "config.json" not in folder.names:
        return None
    try:
        return declared(read_json(folder, "config.json").get("_name_or_path"))
    except AdapterError:
        return None


def _tuned_experts(folder: Folder, ignore_keys: Collection[str]) -> tuple[set[ExpertKey] | None, list[str]]:
    """The (layer, expert) pairs that expert_cfg.json lists, or None where there is no such file; and notes on it."""
    if CONFIG not in folder.names:
        return None, []
    config, known = read_json(folder, CONFIG), {"experts", *_FLAGS}
    refuse_known(ignore_keys, known, CONFIG)
    for flag, what in _FLAGS.items():
        if config.get(flag) not in (None, False):
            raise UnsupportedAdapter(
                f"{flag} is set: an adapter that tunes {what} is not served; tune routed experts only, or serve the "
                "tuned model as a base"
            )
    notes = check_unknown(config, known, ignore_keys, CONFIG)
    experts = config.get("experts")
    if not isinstance(experts, dict) or not experts:
        raise InvalidAdapter(
            f"{CONFIG} must map layers to lists of expert ids under 'experts': write them there, or remove the file to "
            "have them read off the tensors"
        )
    return {(layer, expert) for key, ids in experts.items() for layer, expert in _layer_entries(key, ids)}, notes


def _layer_entries(key: str, ids: Any) -> list[ExpertKey]:
    sound = isinstance(ids, list) and all(type(expert) is int and 0 <= expert < 10**6 for expert in ids)
    if not re.fullmatch(_NUMBER, key) or not sound:
        raise InvalidAdapter(
            f"{CONFIG}: layer {key[:80]!r} must be a number in plain digits with a list of expert ids; "
            "correct the entry"
        )
    if len(set(ids)) != len(ids):
        raise InvalidAdapter(f"{CONFIG}: layer {key} lists an expert twice; list each once")
    return [(int(key), expert) for expert in ids]


def _bind(tensors: dict[str, TensorRef], tuned: set[ExpertKey] | None, base: BaseSpec) -> list[ExpertReplacement]:
    if not base.experts:
        raise UnsupportedAdapter(
            f"an ESFT adapter needs a mixture-of-experts base; this one is {base.model_type}: {remedies.OTHER_MODEL}"
        )
    findings = Findings()
    found: dict[ExpertKey, dict[str, TensorRef]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            what, remedy = remedies.for_esft_tensor(key)
            findings.refuse(f"{shown(key)}: not an expert's gate, up or down matrix but {what}", remedy)
            continue
        where, matrix = (int(match["layer"]), int(match["expert"])), _MATRIX[match["matrix"]]
        problem = _tensor_problem(where, matrix, tensor, tuned, base)
        if problem is None and matrix in found.setdefault(where, {}):
            problem = f"a second {matrix} matrix for this expert", remedies.TWICE
        if problem is not None:
            findings.refuse(f"{shown(key)}: {problem[0]}", problem[1])
        else:
            found[where][matrix] = tensor
    complete = {where: matrices for where, matrices in sorted(found.items()) if len(matrices) == 3}
    for layer, expert in sorted(((tuned or set()) | set(found)) - set(complete)):
        missing = [matrix for matrix in ("gate", "up", "down") if matrix not in found.get((layer, expert), {})]
        problem_here = f"layer {layer} expert {expert}: {', '.join(missing)} missing or unusable"
        findings.refuse(problem_here, f"copy all files of the adapter, or list in {CONFIG} only what was tuned")
    if findings.problems:
        raise coverage_error(findings.problems, 3 * len(complete), len(tensors), findings.remedies)
    return [
        ExpertReplacement(layer, expert, (matrices["gate"], matrices["up"]), matrices["down"])
        for (layer, expert), matrices in complete.items()
    ]


def _tensor_problem(
    where: ExpertKey, matrix: str, tensor: TensorRef, tuned: set[ExpertKey] | None, base: BaseSpec
) -> tuple[str, str] | None:
    """What is wrong, and what to do."""
    layer, expert = where
    stack: ExpertStack | None = base.experts.get(layer)
    if stack is None:
        return f"layer {layer} of the base has no routed experts", remedies.OTHER_MODEL
    if not stack.is_plain:
        problem = f"experts of {base.model_type} have another layout than ESFT's gate, up and down"
        return problem, "train a LoRA on them (PEFT: target_parameters)"
    if expert >= stack.num_experts:
        return f"the base has {stack.num_experts} experts in layer {layer}", remedies.OTHER_MODEL
    if tuned is not None and where not in tuned:
        return f"{CONFIG} does not list expert {expert} of layer {layer}", "list it there, or remove its tensors"
    hidden, intermediate = stack.hidden_size, stack.intermediate_size
    expected = (hidden, intermediate) if matrix == "down" else (intermediate, hidden)
    if tensor.shape != expected:
        return f"shape {list(tensor.shape)}, expected {list(expected)}", remedies.OTHER_MODEL
    return None
