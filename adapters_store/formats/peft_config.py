"""adapter_config.json of a PEFT LoRA: what decides the arithmetic is read, what would change it is refused by its key.

`rank_pattern` and `alpha_pattern` override r and alpha for linears whose name ends in a match, first match first. PEFT
matches a linear that `target_modules` names by its own name, and one whose weight `target_parameters` names by that of
the weight (`model.layers.0.self_attn.o_proj.weight`). Names are those of the file, not of this base:
PEFT knew no others.
"""

from collections.abc import Collection, Sequence
from math import sqrt
from typing import Any

import msgspec
import regex

from adapters_store.declared_base import declared
from adapters_store.errors import InvalidAdapter, UnsupportedAdapter, shown
from adapters_store.files import Folder
from adapters_store.formats import remedies
from adapters_store.formats.patterns import Patterns
from adapters_store.formats.unknown_keys import OFF, check_unknown, refuse_known, value_of
from adapters_store.json_file import read_json

CONFIG = "adapter_config.json"
_MAX_ALPHA = 1e9
_MAX_RANK = 1 << 31
_MAX_PATTERNS = 2000
_TARGET_SECONDS = 0.1  # for target_modules to match one name: it is the sender's regular expression

# keys that say how the adapter was trained, or what the tensors say themselves; they do not change how it is served
_INERT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout",
    "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "task_type", "use_qalora",
}  # fmt: skip
_READ = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "target_parameters",
         "init_lora_weights", "use_dora"}  # fmt: skip
_BIASES = ("all", "lora_only")  # which of the base's biases were trained along
# initialisations that also change the base weights, so that the adapter alone does not describe the model
_HARMLESS_INITS = ("true", "gaussian", "eva", "orthogonal", "mica")
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")


class _Fields(msgspec.Struct):
    """The part of adapter_config.json that decides the arithmetic."""

    r: int
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    target_modules: list[str] | str | None = None
    target_parameters: list[str] = []
    init_lora_weights: bool | str | None = True
    use_dora: bool = False


class LoraConfig:
    """Rank and scale of each linear. `notes` are on keys that were passed over."""

    def __init__(self, fields: _Fields, raw: dict[str, Any], notes: Sequence[str]) -> None:
        self.declared_base, self.notes = declared(raw.get("base_model_name_or_path")), tuple(notes)
        version = raw.get("peft_version")
        self.peft_version = version if isinstance(version, str) else ""
        self.trained_biases = raw.get("bias") if raw.get("bias") in _BIASES else None
        self.target_modules, self.target_parameters = fields.target_modules, fields.target_parameters
        self.use_dora, self._use_rslora = fields.use_dora, fields.use_rslora
        self._ranks = Patterns("rank_pattern", fields.rank_pattern, fields.r, CONFIG)
        self._alphas = Patterns("alpha_pattern", fields.alpha_pattern, fields.lora_alpha, CONFIG)
        self._targets, self._excluded = _of_modules(fields.target_modules), _of_modules(raw.get("exclude_modules"))
        self._listed_parameters = set(fields.target_parameters)

    def rank_and_scale(self, names: Sequence[str]) -> tuple[int, float]:
        """Of a linear that PEFT may have known by any of `names`. Raises InvalidAdapter where the patterns give it two
        meanings."""
        found = [{self._by_name(known_by) for known_by in self._names(name)} for name in names]
        if any(len(meanings) > 1 for meanings in found):
            raise InvalidAdapter(
                f"{shown(names[0])} is named by target_modules and, by its weight, by target_parameters, and the "
                "patterns give it another rank or alpha under each name; PEFT does not load that either. Name it once"
            )
        return _one_meaning(set().union(*found), names)

    def rank_and_scale_of_parameter(self, names: Sequence[str]) -> tuple[int, float]:
        """Of a parameter that target_parameters names itself: the matrices of all experts, say."""
        return _one_meaning({self._by_name(name) for name in names}, names)

    def lists_parameter(self, names: Sequence[str]) -> bool:
        """Whether target_parameters names it, or names nothing at all."""
        listed = self._listed_parameters
        return not listed or any(not listed.isdisjoint(endings(name)) for name in names)

    def _by_name(self, name: str) -> tuple[int, float]:
        rank, alpha = self._ranks.find(name), self._alphas.find(name)
        return rank, alpha / sqrt(rank) if self._use_rslora else alpha / rank

    def _names(self, module: str) -> list[str]:
        """What PEFT may match the patterns with. Two where both keys name the linear; PEFT's exclude_modules and
        layers_to_transform could still take one away, and are not followed."""
        weight = f"{module}.weight"
        if self._listed_parameters.isdisjoint(endings(weight)):
            return [module]
        return [weight, module] if self._is_target(module) else [weight]

    def _is_target(self, module: str) -> bool:
        return self._targets == "all-linear" or _names(self._targets, module, "target_modules")

    def is_excluded(self, module: str) -> bool:
        """Whether PEFT left this module alone, though it is a target."""
        return _names(self._excluded, module, "exclude_modules")


def _of_modules(value: object) -> frozenset[str] | str:
    """PEFT's keys of modules: a list of what names end in, or a regular expression of the whole name."""
    if isinstance(value, list):
        return frozenset(it for it in value if isinstance(it, str))
    return value if isinstance(value, str) else frozenset()


def _names(value: frozenset[str] | str, module: str, key: str) -> bool:
    if not isinstance(value, str):
        return not value.isdisjoint(endings(module))
    try:
        return bool(regex.fullmatch(value, module, timeout=_TARGET_SECONDS))
    except (regex.error, TimeoutError):
        raise InvalidAdapter(
            f"{key} in {CONFIG} cannot be used as a regular expression: list the modules' names instead"
        ) from None


def endings(name: str) -> list[str]:
    """a.b.c -> a.b.c, b.c, c: what PEFT takes for the name of a module."""
    steps = name.split(".")
    return [".".join(steps[start:]) for start in range(len(steps))]


def _one_meaning(found: set[tuple[int, float]], names: Sequence[str]) -> tuple[int, float]:
    if len(found) > 1:
        raise InvalidAdapter(
            f"PEFT may have known {shown(names[-1])} by that name or as {shown(names[0])}, and the patterns give it "
            "another rank or alpha under each: write patterns that match both, or rename the tensors"
        )
    return found.pop()


def read_config(folder: Folder, ignore_keys: Collection[str] = ()) -> LoraConfig:
    raw = read_json(folder, CONFIG)
    notes = _refuse_other_methods(raw)
    notes += _refuse_other_arithmetic(raw, ignore_keys)
    read = {key: raw[key] for key in _READ if raw.get(key) is not None and not (key == "use_dora" and raw[key] in OFF)}
    try:
        fields = msgspec.convert(read, _Fields, strict=True)
    except msgspec.ValidationError as error:
        raise InvalidAdapter(f"{CONFIG}: {error}; correct the key, or save the adapter again with PEFT") from None
    alphas = [fields.lora_alpha, *fields.alpha_pattern.values()]
    if not all(1 <= rank <= _MAX_RANK for rank in (fields.r, *fields.rank_pattern.values())):
        raise InvalidAdapter(
            f"{CONFIG}: r and rank_pattern must be at least 1 and at most {_MAX_RANK:,}: write the ranks of the tensors"
        )
    if not all(abs(alpha) <= _MAX_ALPHA for alpha in alphas):
        raise InvalidAdapter(
            f"{CONFIG}: lora_alpha and alpha_pattern must be at most {_MAX_ALPHA:.0e}: scale B instead"
        )
    num_patterns = len(fields.rank_pattern) + len(fields.alpha_pattern)
    if num_patterns > _MAX_PATTERNS:
        raise InvalidAdapter(
            f"{CONFIG}: {num_patterns:,} patterns; at most {_MAX_PATTERNS:,} are read: a regular expression may stand "
            "for many names"
        )
    return LoraConfig(fields, raw, notes)


def _refuse_other_methods(raw: dict[str, Any]) -> list[str]:
    """A note on the task, which changes nothing as long as no head of another task comes with it."""
    peft_type, task = raw.get("peft_type"), raw.get("task_type")
    if peft_type != "LORA":
        remedy = remedies.for_peft_type(peft_type if isinstance(peft_type, str) else None)
        raise UnsupportedAdapter(f"peft_type {value_of(peft_type)} is not served; LORA is: {remedy}")
    _refuse_changed_base(raw.get("init_lora_weights"))
    if task in (None, "CAUSAL_LM"):
        return []
    return [f"task_type is {value_of(task)}; the adapter is served as CAUSAL_LM."]


def _refuse_changed_base(init: object) -> None:
    """Of a way to begin that nobody knows yet one cannot say whether it left the base alone: most new ones did not."""
    if not isinstance(init, str) or init.lower() in _HARMLESS_INITS:
        return
    changing = next((it for it in _BASE_CHANGING_INITS if init.lower().startswith(it)), None)
    what = f"{changing!r} also changed the base weights" if changing else "(a text) is not known"
    remedy = "save it as a plain LoRA first (PEFT: path_initial_model_for_weight_conversion)"
    if changing is None:
        remedy += "; if it left the base's weights alone, set the key to true"
    raise UnsupportedAdapter(f"init_lora_weights {what}; {remedy}")


def _refuse_other_arithmetic(raw: dict[str, Any], ignore_keys: Collection[str]) -> list[str]:
    """Any key that is neither read nor inert must be off: an unknown one may change the formula."""
    arithmetic = _READ | set(remedies.KEYS)
    refuse_known(ignore_keys, arithmetic, CONFIG)
    for key, value in raw.items():
        if key in remedies.KEYS and value not in OFF and not (key == "bias" and value in (*_BIASES, "none")):
            raise UnsupportedAdapter(f"{key} = {value_of(value)} in {CONFIG} is not served: {remedies.KEYS[key]}")
    return check_unknown(raw, arithmetic | _INERT, ignore_keys, CONFIG)
