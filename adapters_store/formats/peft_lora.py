"""PEFT LoRA: `adapter_config.json` and `adapter_model.safetensors`, as written by `PeftModel.save_pretrained`.

    y += scale * B(A x)      scale = alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2106.09685, 2312.03732)

`rank_pattern` and `alpha_pattern` override r and alpha for modules whose name ends in a match, first match first, as
PEFT does. Everything that changes the arithmetic and is not this formula is refused by its configuration key.
"""

import hashlib
import re
from collections.abc import Iterable
from math import sqrt
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import regex

from adapters_store.base_spec import BaseSpec
from adapters_store.errors import CoverageError, InvalidAdapter, UnsupportedAdapter
from adapters_store.parts import AdapterPackage, LowRank, TensorRef
from adapters_store.safetensors_file import hash_and_check_finite, read_header, read_json

WEIGHTS = "adapter_model.safetensors"
_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight$")
Number = TypeVar("Number", int, float)
_MAX_ALPHA = 1e9
_MAX_PATTERNS = 2000
_PATTERN_SECONDS = 0.1  # a pattern is the sender's regular expression: it must not hold up the server

# keys that say how the adapter was trained, or what the tensors say themselves; they do not change how it is served
_INERT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "target_parameters", "task_type",
}  # fmt: skip
_READ = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "init_lora_weights"}
# initialisations that also change the base weights, so that the adapter alone does not describe the model
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")


class _Config(msgspec.Struct):
    """The part of adapter_config.json that decides the arithmetic."""

    r: int
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    target_modules: list[str] | str | None = None
    init_lora_weights: bool | str | None = True

    def rank_of(self, module: str) -> int:
        return _by_pattern(self.rank_pattern, module, self.r)

    def scale_of(self, module: str, rank: int) -> float:
        alpha = _by_pattern(self.alpha_pattern, module, self.lora_alpha)
        return alpha / sqrt(rank) if self.use_rslora else alpha / rank


def read(directory: Path, base: BaseSpec) -> AdapterPackage:
    config = _read_config(directory)
    if not (directory / WEIGHTS).exists():
        if (directory / "adapter_model.bin").exists():
            raise InvalidAdapter(f"adapter_model.bin is a pickle, which is never opened; save it as {WEIGHTS}")
        raise InvalidAdapter(f"{WEIGHTS} is missing")
    tensors = read_header(directory, WEIGHTS)
    parts = _bind(tensors, config, base)
    file_hash, file = hash_and_check_finite(directory, WEIGHTS)
    # the scale is part of what the weights mean, so it is part of the revision; paths and names are not
    scales = ";".join(f"{part.module}={part.scale!r}" for part in parts)
    revision = hashlib.sha256(f"peft_lora:{file_hash}:{scales}".encode()).hexdigest()
    return AdapterPackage("lora", str(directory), revision, (file,), tuple(parts))


def _read_config(directory: Path) -> _Config:
    raw = read_json(directory, "adapter_config.json")
    peft_type = raw.get("peft_type")
    if peft_type != "LORA":
        raise UnsupportedAdapter(f"peft_type {peft_type!r} is not served; LORA is")
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        raise UnsupportedAdapter(f"task_type {raw['task_type']!r} is not served; CAUSAL_LM is")
    _refuse_other_arithmetic(raw)
    try:
        config = msgspec.convert({key: raw[key] for key in _READ if raw.get(key) is not None}, _Config, strict=True)
    except msgspec.ValidationError as error:
        raise InvalidAdapter(f"adapter_config.json: {error}") from None
    alphas = [config.lora_alpha, *config.alpha_pattern.values()]
    if config.r < 1 or any(rank < 1 for rank in config.rank_pattern.values()):
        raise InvalidAdapter("adapter_config.json: r and rank_pattern must be at least 1")
    if not all(abs(alpha) <= _MAX_ALPHA for alpha in alphas):
        raise InvalidAdapter(f"adapter_config.json: lora_alpha and alpha_pattern must be at most {_MAX_ALPHA:.0e}")
    if len(config.rank_pattern) + len(config.alpha_pattern) > _MAX_PATTERNS:
        raise InvalidAdapter(f"adapter_config.json: more than {_MAX_PATTERNS} patterns")
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        raise UnsupportedAdapter(
            f"init_lora_weights {init!r} also changed the base weights; save it as a plain LoRA first "
            "(PEFT: path_initial_model_for_weight_conversion)"
        )
    return config


def _refuse_other_arithmetic(raw: dict[str, Any]) -> None:
    """Any key that is neither read nor inert must be off: an unknown one may change the formula.

    An empty object is not off: PEFT takes it for a configuration with its defaults.
    """
    for key, value in raw.items():
        if key in _READ or key in _INERT or value in (None, False, [], "none"):
            continue
        raise UnsupportedAdapter(f"{key} = {_short(value)} in adapter_config.json is not served")


def _bind(tensors: dict[str, TensorRef], config: _Config, base: BaseSpec) -> list[LowRank]:
    """Pair A with B for each module. Raises CoverageError with a line for every tensor that does not fit."""
    problems: list[str] = []
    sides: dict[str, dict[str, TensorRef]] = {}
    for key, tensor in tensors.items():
        match = _KEY.match(key)
        if key.endswith((".base_layer.weight", ".embed_tokens.weight", ".lm_head.weight")):
            problems.append(f"{key[:200]}: a copy of a base weight; save the adapter with save_embedding_layers=False")
        elif match is None:
            problems.append(f"{key[:200]}: not the A or B of a LoRA linear")
        elif match["module"].endswith((".experts", ".experts.base_layer")):
            problems.append(f"{key[:200]}: LoRA on routed experts is not served")
        elif match["module"] not in base.linears:
            problems.append(f"{key[:200]}: the base has no linear {match['module'][:200]}")
        elif match["side"] in sides.setdefault(match["module"], {}):
            problems.append(f"{key[:200]}: a second lora_{match['side']} for the same module")
        else:
            sides[match["module"]][match["side"]] = tensor
    parts: list[LowRank] = []
    for module, pair in sorted(sides.items()):
        problem = _pair_problem(module, pair, config, base)
        if problem is None:
            rank = pair["A"].shape[0]
            parts.append(LowRank(module, pair["A"], pair["B"], config.scale_of(module, rank)))
        else:
            problems.append(problem)
    problems += _untouched_targets(config, parts, base)
    if problems:
        raise CoverageError(problems, bound=2 * len(parts))
    return parts


def _pair_problem(module: str, pair: dict[str, TensorRef], config: _Config, base: BaseSpec) -> str | None:
    if len(pair) == 1:
        side = next(iter(pair))
        return f"{module}: lora_{side} without lora_{'B' if side == 'A' else 'A'}"
    out_features, in_features = base.linears[module]
    rank = config.rank_of(module)
    for side, expected in (("A", (rank, in_features)), ("B", (out_features, rank))):
        if pair[side].shape != expected:
            return f"{module}.lora_{side}: shape {list(pair[side].shape)}, expected {list(expected)}"
    return None


def _untouched_targets(config: _Config, parts: list[LowRank], base: BaseSpec) -> list[str]:
    """Targets that the configuration lists and the base has, but the file holds no tensor for."""
    if not isinstance(config.target_modules, list):
        return []
    there, bound = _endings(base.linears), _endings(part.module for part in parts)
    return [
        f"target_modules lists {target[:200]}, but the file has no tensors for it"
        for target in sorted(config.target_modules)
        if target in there and target not in bound
    ]


def _endings(modules: Iterable[str]) -> set[str]:
    """a.b.c -> a.b.c, b.c, c: what PEFT takes for the name of the module."""
    endings: set[str] = set()
    for module in modules:
        steps = module.split(".")
        endings |= {".".join(steps[start:]) for start in range(len(steps))}
    return endings


def _by_pattern(patterns: dict[str, Number], module: str, default: Number) -> Number:
    for pattern, value in patterns.items():
        try:
            if regex.match(rf"(.*\.)?({pattern})$", module, timeout=_PATTERN_SECONDS):
                return value
        except (regex.error, TimeoutError):
            raise InvalidAdapter(f"the pattern {_short(pattern)} in adapter_config.json cannot be used") from None
    return default


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
