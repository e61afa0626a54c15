"""ESFT (arXiv 2407.01906): whole experts of a MoE base, tuned and stored as absolute weights.

    expert_cfg.json                   {"experts": {"1": [35, 22]}, "shared_experts": bool, "non_expert_modules": bool}
    model-00001-of-000001.safetensors [model.]layers.{L}.mlp.experts.{E}.{gate,up,down}_proj.weight
                                      [model.]layers.{L}.mlp.shared_experts.{gate,up,down}_proj.weight
    model.safetensors.index.json      optional

The key prefix `model.` is absent on the hub's first checkpoints and present in those that the trainer writes today.
The trainer may leave expert_cfg.json out; the tuned experts are then read off the tensor names. Expert lists are in
order of relevance, not of id. Mixtral's w1, w3 and w2 are the same three matrices, and families call the block that
holds the experts differently (mlp, block_sparse_moe, feed_forward, or nothing at all).

Shared experts are one layer in the file, whose inner width is that of n experts; they are read as n experts, numbered
behind the routed ones.

The trainer's expert-parallel form writes one directory a rank, each with the experts of that rank and nothing that says
so but its name: `last_checkpoint_ep0`, `last_checkpoint_ep1`, …
"""

import re
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from msgspec.structs import replace

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
from adapters_store.parts import ExpertReplacement, TensorRef, Whole
from adapters_store.safetensors_file import read_header

CONFIG = "expert_cfg.json"
INDEX = "model.safetensors.index.json"
_FLAGS = ("shared_experts", "non_expert_modules")
_NUMBER = r"(?:0|[1-9][0-9]{0,5})"
_KEY = re.compile(
    rf"(?:(?:model|transformer)\.)?(?:layers|blocks)\.(?P<layer>{_NUMBER})\.(?:[a-z_]{{1,40}}\.)?"
    rf"(?:experts\.(?P<expert>{_NUMBER})|shared_experts)\."
    r"(?P<matrix>gate_proj|up_proj|down_proj|w1|w3|w2)\.weight"
)
_MATRIX = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
_RANK = re.compile(r".*_ep[0-9]+", re.DOTALL)
_MERGE_RANKS = (
    f"put the safetensors files of all ranks into one directory, or beside this one's write the {CONFIG} that lists "
    "every tuned expert"
)

ExpertKey = tuple[int, int]  # (layer, expert)
_SHARED = -1  # in the place of an expert's number: all shared experts of the layer


class _Told(NamedTuple):
    """What expert_cfg.json says. None: there is no such file."""

    experts: set[ExpertKey] | None
    shared: bool | None
    notes: list[str]


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
    told = _told(folder, ignore_keys)
    parts = _bind(tensors, told, base)
    return Reading("esft", shards, tuple(parts), declared_base=_declared_base(folder), notes=tuple(told.notes))


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


def _told(folder: Folder, ignore_keys: Collection[str]) -> _Told:
    if CONFIG not in folder.names:
        return _Told(None, None, [])
    config, known = read_json(folder, CONFIG), {"experts", *_FLAGS}
    refuse_known(ignore_keys, known, CONFIG)
    if config.get("non_expert_modules") not in (None, False):
        raise UnsupportedAdapter(
            "non_expert_modules is set: an adapter that tunes modules outside the experts is not served; "
            f"{remedies.EXPERTS_ONLY}"
        )
    shared = config.get("shared_experts")
    if not (shared is None or isinstance(shared, bool)):
        raise InvalidAdapter(f"{CONFIG}: shared_experts must be true or false; correct it")
    notes = check_unknown(config, known, ignore_keys, CONFIG)
    experts = config.get("experts")
    if not isinstance(experts, dict) or not (experts or shared):
        raise InvalidAdapter(
            f"{CONFIG} must map layers to lists of expert ids under 'experts': write them there, or remove the file to "
            "have them read off the tensors"
        )
    tuned = {(layer, expert) for key, ids in experts.items() for layer, expert in _layer_entries(key, ids)}
    return _Told(tuned, bool(shared), notes)


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


def _bind(tensors: dict[str, TensorRef], told: _Told, base: BaseSpec) -> list[ExpertReplacement]:
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
        where, matrix = (int(match["layer"]), int(match["expert"] or _SHARED)), _MATRIX[match["matrix"]]
        problem = _tensor_problem(where, matrix, tensor, told, base)
        if problem is None and matrix in found.setdefault(where, {}):
            problem = f"a second {matrix} matrix for this expert", remedies.TWICE
        if problem is not None:
            findings.refuse(f"{shown(key)}: {problem[0]}", problem[1])
        else:
            found[where][matrix] = tensor
    complete = {where: matrices for where, matrices in sorted(found.items()) if len(matrices) == 3}
    has_shared = any(expert == _SHARED for _, expert in found)
    for where in sorted((_listed(told, base, has_shared) | set(found)) - set(complete)):
        missing = [matrix for matrix in ("gate", "up", "down") if matrix not in found.get(where, {})]
        problem_here = f"{_called(where)}: {', '.join(missing)} missing or unusable"
        findings.refuse(problem_here, f"copy all files of the adapter, or list in {CONFIG} only what was tuned")
    if told.shared and not has_shared:
        remedy = f"put the files that hold them beside these, or set it to false in {CONFIG}"
        findings.refuse("shared_experts is set, and there are none", remedy)
    if findings.problems:
        raise coverage_error(findings.problems, 3 * len(complete), len(tensors), findings.remedies)
    return [part for where, matrices in complete.items() for part in _parts(where, matrices, base)]


def _listed(told: _Told, base: BaseSpec, has_shared: bool) -> set[ExpertKey]:
    """What must be there. Shared experts are tuned in every layer that has them, or in none."""
    listed = set(told.experts or ())
    if told.shared and has_shared:
        listed |= {(layer, _SHARED) for layer, stack in base.experts.items() if stack.num_shared}
    return listed


def _parts(where: ExpertKey, matrices: dict[str, TensorRef], base: BaseSpec) -> Iterator[ExpertReplacement]:
    layer, expert = where
    if expert != _SHARED:
        yield ExpertReplacement(layer, expert, (matrices["gate"], matrices["up"]), matrices["down"])
        return
    stack = base.experts[layer]
    for index in range(stack.num_shared):
        gate, up, down = (_block(matrices[it], it, index, stack) for it in ("gate", "up", "down"))
        yield ExpertReplacement(layer, stack.num_experts + index, (gate, up), down)


def _block(tensor: TensorRef, matrix: str, index: int, stack: ExpertStack) -> TensorRef:
    """One shared expert's, of all that the tensor holds: rows of gate and up, columns of down."""
    if stack.num_shared == 1:
        return tensor
    hidden, inner = stack.hidden_size, stack.intermediate_size
    shape, start = ((hidden, inner), (0, index * inner)) if matrix == "down" else ((inner, hidden), (index * inner, 0))
    return replace(tensor, shape=shape, cut_from=Whole(tensor.shape, start))


def _called(where: ExpertKey) -> str:
    layer, expert = where
    return f"layer {layer} shared experts" if expert == _SHARED else f"layer {layer} expert {expert}"


def _tensor_problem(
    where: ExpertKey, matrix: str, tensor: TensorRef, told: _Told, base: BaseSpec
) -> tuple[str, str] | None:
    """What is wrong, and what to do."""
    layer, expert = where
    stack: ExpertStack | None = base.experts.get(layer)
    if stack is None:
        return f"layer {layer} of the base has no routed experts", remedies.OTHER_MODEL
    if not stack.is_plain:
        problem = f"experts of {base.model_type} have another layout than ESFT's gate, up and down"
        return problem, "train a LoRA on them (PEFT: target_parameters)"
    if expert == _SHARED:
        return _shared_problem(layer, matrix, tensor, told, stack)
    if expert >= stack.num_experts:
        return f"the base has {stack.num_experts} experts in layer {layer}", remedies.OTHER_MODEL
    if told.experts is not None and where not in told.experts:
        return f"{CONFIG} does not list expert {expert} of layer {layer}", "list it there, or remove its tensors"
    return _shape_problem(matrix, tensor, stack.hidden_size, stack.intermediate_size)


def _shared_problem(
    layer: int, matrix: str, tensor: TensorRef, told: _Told, stack: ExpertStack
) -> tuple[str, str] | None:
    if not stack.num_shared:
        return f"layer {layer} of the base has no shared experts that can be replaced", remedies.EXPERTS_ONLY
    if told.shared is False:
        return f"{CONFIG} does not say that shared experts are tuned", "set shared_experts there, or remove its tensors"
    return _shape_problem(matrix, tensor, stack.hidden_size, stack.num_shared * stack.intermediate_size)


def _shape_problem(matrix: str, tensor: TensorRef, hidden: int, inner: int) -> tuple[str, str] | None:
    expected = (hidden, inner) if matrix == "down" else (inner, hidden)
    if tensor.shape != expected:
        return f"shape {list(tensor.shape)}, expected {list(expected)}", remedies.OTHER_MODEL
    return None
