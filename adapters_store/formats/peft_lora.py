"""PEFT LoRA: `adapter_config.json` and `adapter_model.safetensors`, as written by `PeftModel.save_pretrained`.

    y += scale * B(A x)      scale = alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2106.09685, 2312.03732)

Everything that is not this formula is refused, by its configuration key or by its tensors.
"""

import re
from collections import Counter

from adapters_store.base_spec import BaseSpec
from adapters_store.errors import InvalidAdapter, coverage_error, shown
from adapters_store.files import Folder
from adapters_store.formats import remedies
from adapters_store.formats.peft_config import CONFIG, LoraConfig, endings, read_config
from adapters_store.formats.reading import Reading
from adapters_store.parts import LowRank, TensorRef
from adapters_store.safetensors_file import read_header

WEIGHTS = "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
Sides = dict[str, TensorRef]  # "A" and "B"


def read(folder: Folder, base: BaseSpec) -> Reading:
    config = read_config(folder)
    _refuse_other_files(folder)
    weights = read_header(folder.open(WEIGHTS))
    parts = _Binding(config, base).bind(weights.tensors)
    scales = ";".join(f"{part.module}={part.scale!r}" for part in parts)
    return Reading("lora", (weights,), tuple(parts), scales, config.declared_base)


def _refuse_other_files(folder: Folder) -> None:
    """Weights that would not be read must not lie there: nobody could say what the adapter is."""
    if WEIGHTS not in folder.names:
        if "adapter_model.bin" in folder.names:
            raise InvalidAdapter(f"adapter_model.bin is a pickle, which is never opened; save it as {WEIGHTS}")
        raise InvalidAdapter(f"{WEIGHTS} is missing")
    for name in folder.names:
        if name == "expert_cfg.json" or (name.endswith(".safetensors") and name != WEIGHTS):
            raise InvalidAdapter(
                f"{shown(name)} lies beside {CONFIG}, and a LoRA is read from {WEIGHTS} alone: remove it, or move it "
                "to a directory of its own if it is another adapter"
            )


class _Binding:
    """Pairs A with B for each linear, and collects a line for everything that does not fit, with what to do."""

    def __init__(self, config: LoraConfig, base: BaseSpec) -> None:
        self._config, self._base = config, base
        self._problems: list[str] = []
        self._remedies: list[str] = []
        self._expert_tensors: list[str] = []

    def bind(self, tensors: tuple[TensorRef, ...]) -> list[LowRank]:
        """Raises CoverageError."""
        sides = self._sort(tensors)
        parts = [part for module, pair in sorted(sides.items()) if (part := self._pair(module, pair)) is not None]
        if self._expert_tensors:  # said once: there may be thousands
            count, first = len(self._expert_tensors), shown(self._expert_tensors[0])
            self._refuse(f"{count} are LoRA on routed experts ({first}{', …' if count > 1 else ''})", remedies.EXPERTS)
        self._problems += self._untouched_targets(parts)
        if self._problems:
            raise coverage_error(self._problems, 2 * len(parts), len(tensors), self._remedies)
        return parts

    def _refuse(self, problem: str, remedy: str | None = None) -> None:
        self._problems.append(problem)
        if remedy is not None and remedy not in self._remedies:
            self._remedies.append(remedy)

    def _sort(self, tensors: tuple[TensorRef, ...]) -> dict[str, Sides]:
        """A and B by module, for the modules that the base has."""
        sides: dict[str, Sides] = {}
        names: Counter[str | None] = Counter()
        for tensor in tensors:
            match = _KEY.fullmatch(tensor.key)
            if match is None:
                what, remedy = remedies.for_tensor(tensor.key)
                self._refuse(f"{shown(tensor.key)}: not the A or B of a LoRA linear but {what}", remedy)
                continue
            module, side = match["module"], match["side"]
            names[match["adapter"]] += 1
            if module.endswith((".experts", ".experts.base_layer")):
                self._expert_tensors.append(tensor.key)
            elif module not in self._base.linears:
                what, remedy = remedies.for_module(module, self._base.linears)
                self._refuse(f"{shown(tensor.key)}: the base has no linear {shown(module)} ({what})", remedy)
            else:
                sides.setdefault(module, {})[side] = tensor
        _refuse_two_names(names)  # a side that came twice came under two names
        return sides

    def _pair(self, module: str, pair: Sides) -> LowRank | None:
        if len(pair) == 1:
            side = next(iter(pair))
            self._refuse(f"{shown(module)}: lora_{side} without lora_{'B' if side == 'A' else 'A'}")
            return None
        out_features, in_features = self._base.linears[module]
        rank, scale = self._config.rank_and_scale(module)
        for side, expected in (("A", (rank, in_features)), ("B", (out_features, rank))):
            shape = pair[side].shape
            if shape != expected:
                remedy = "if the ranks differ from module to module, list them in rank_pattern"
                self._refuse(f"{shown(module)}.lora_{side}: shape {list(shape)}, expected {list(expected)}", remedy)
                return None
        return LowRank(module, pair["A"], pair["B"], scale)

    def _untouched_targets(self, parts: list[LowRank]) -> list[str]:
        """Targets that the configuration lists and the base has, but the file holds no tensor for."""
        there = {ending for module in self._base.linears for ending in endings(module)}
        bound = {ending for part in parts for ending in endings(part.module)}
        modules = self._config.target_modules
        listed = [("target_modules", target, target) for target in (modules if isinstance(modules, list) else ())]
        listed += [("target_parameters", it, it.removesuffix(".weight")) for it in self._config.target_parameters]
        return [
            f"{key} lists {shown(target)}, but the file has no tensors for it"
            for key, target, module in sorted(listed)
            if module in there and module not in bound
        ]


def _refuse_two_names(names: Counter[str | None]) -> None:
    """`lora_A.default` names an adapter; PEFT loads those of one name, and files have none as a rule."""
    if len(names) < 2:
        return
    told = ", ".join(f"{count} of {shown(name)!r}" for name, count in sorted((n, c) for n, c in names.items() if n)[:4])
    told += f", {names[None]} without a name" if names[None] else ""
    raise InvalidAdapter(
        f"{WEIGHTS} holds tensors of more than one adapter ({told}): save each adapter in a directory of its own "
        "(PEFT: save_pretrained with selected_adapters)"
    )
