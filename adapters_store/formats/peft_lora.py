"""PEFT LoRA: `adapter_config.json` and `adapter_model.safetensors`, as written by `PeftModel.save_pretrained`.

    y += scale * B(A x)      scale = alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2106.09685, 2312.03732)

on linears, on the matrices of routed experts, and with DoRA's magnitudes (arXiv 2402.09353). Everything that is not
this is refused, by its configuration key or by its tensors.
"""

import re
from collections.abc import Collection, Sequence

from adapters_store.base_spec import BaseSpec, ExpertStack
from adapters_store.errors import InvalidAdapter, UnsupportedAdapter, coverage_error, shown
from adapters_store.files import Folder
from adapters_store.formats import remedies
from adapters_store.formats.expert_keys import ExpertKeys
from adapters_store.formats.expert_parameters import PARAMETERS, ExpertParameters
from adapters_store.formats.lora_tensors import LoraModule, by_module, paired
from adapters_store.formats.names import BaseNames
from adapters_store.formats.peft_config import CONFIG, LoraConfig, endings, read_config
from adapters_store.formats.projections import Projections
from adapters_store.formats.reading import Findings, Reading
from adapters_store.formats.shards import by_key, check_index, read_shards
from adapters_store.limits import limits_of
from adapters_store.parts import LowRank, TensorRef

WEIGHTS = "adapter_model.safetensors"
INDEX = "adapter_model.safetensors.index.json"
_SHARD = re.compile(r"adapter_model-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.safetensors")


def read(folder: Folder, base: BaseSpec, ignore_keys: Collection[str] = ()) -> Reading:
    config, limits = read_config(folder, ignore_keys), limits_of(base)
    files = _weight_files(folder)
    shards = read_shards(folder, files, limits)
    tensors = by_key(shards, limits)
    check_index(folder, INDEX, files, tensors, limits)
    binding = _Binding(config, base)
    parts = binding.bind(list(tensors.values()))
    _refuse_trained_biases(config, parts, base)
    notes = (*config.notes, *binding.findings.notes)
    meaning = binding.meaning(parts)
    return Reading("lora", shards, tuple(parts), meaning, config.declared_base, notes, binding.idle)


def _weight_files(folder: Folder) -> list[str]:
    """Weights that would not be read must not lie there: nobody could say what the adapter is."""
    shards = {name: match for name in folder.names if (match := _SHARD.fullmatch(name))}
    files = [WEIGHTS] if WEIGHTS in folder.names else sorted(shards)
    if not files:
        if "adapter_model.bin" in folder.names:
            raise InvalidAdapter(f"adapter_model.bin is a pickle, which is never opened; save it as {WEIGHTS}")
        raise InvalidAdapter(f"{WEIGHTS} is missing: copy it beside {CONFIG}")
    others = " and its other shards" if len(files) > 1 else ""
    for name in folder.names:
        if name == "expert_cfg.json" or (name.endswith(".safetensors") and name not in files):
            raise InvalidAdapter(
                f"{shown(name)} lies beside {CONFIG}, and a LoRA is read from {files[0]}{others} alone: remove it, or "
                "move it to a directory of its own if it is another adapter"
            )
    if files[0] != WEIGHTS:
        counts = {int(match["count"]) for match in shards.values()}
        numbers = {int(match["number"]) for match in shards.values()}
        if len(counts) > 1 or numbers != set(range(1, max(counts) + 1)):
            raise InvalidAdapter(
                f"{len(files)} shards are there, {shown(files[0])} to {shown(files[-1])}, which are not all of one "
                "adapter: copy those that are missing, and remove those of another"
            )
    return files


def _refuse_trained_biases(config: LoraConfig, parts: Sequence[LowRank], base: BaseSpec) -> None:
    """Where there were biases to train, their values are in the file or lost; where there were none, nothing is."""
    trained = config.trained_biases
    if trained is None:
        return
    adapted = {name for part in parts for name in (part.module, part.module.rpartition(".")[0])}
    biased = sorted(base.biased if trained == "all" else base.biased & adapted)
    if biased:
        raise UnsupportedAdapter(
            f"bias = {trained!r} in {CONFIG} is not served: {len(biased):,} modules have a bias that it trained "
            f"({shown(biased[0])}); {remedies.KEYS['bias']}"
        )


class _Binding:
    """Gives each module's tensors to whoever reads such, and holds the whole to the coverage contract."""

    def __init__(self, config: LoraConfig, base: BaseSpec) -> None:
        self._config, self._base = config, base
        self.findings = Findings()
        self._projections = Projections(base, config, self.findings)
        self._parameters = ExpertParameters(config, self.findings)
        self._experts = ExpertKeys(config, self.findings)
        self._stacks = {stack.name: stack for stack in base.experts.values()}
        self._names = BaseNames([*base.linears, *self._projections.names, *self._stacks])
        self._bound: dict[str, tuple[LowRank, list[LoraModule]]] = {}
        self._no_experts: list[str] = []  # keys of those that the base does not have
        self._images: list[LoraModule] = []  # of the image part, which changes nothing if B is zero

    def bind(self, tensors: Sequence[TensorRef]) -> list[LowRank]:
        """Raises CoverageError."""
        modules = by_module(tensors, self.findings)
        for module in modules:
            self._read(module)
        for part, of in (*self._projections.read_parts(), *self._parameters.read(), *self._experts.read()):
            self._keep([part], of)
        if self._no_experts:  # said once: there may be thousands
            first = f"{shown(self._no_experts[0])}{', …' if len(self._no_experts) > 1 else ''}"
            self.findings.refuse(f"{len(self._no_experts)} are {remedies.NO_EXPERTS} ({first})", remedies.OTHER_MODEL)
        self._read_images()
        self._refuse_overlaps()
        self._refuse_untouched_targets(modules)
        made_of = {id(module): module for _, of in self._bound.values() for module in of}
        made_of |= {id(module): module for module in self._images}
        count = sum(len(module.tensors) for module in made_of.values())
        if self.findings.problems or count != len(tensors):  # whatever nobody has read, nobody may pass over
            raise coverage_error(self.findings.problems, count, len(tensors), self.findings.remedies)
        return [part for _, (part, _) in sorted(self._bound.items())]

    @property
    def idle(self) -> frozenset[str]:
        return frozenset(module.b.key for module in self._images if module.b is not None)

    def meaning(self, parts: Sequence[LowRank]) -> str:
        exchanged = set(self._parameters.exchanged)
        return ";".join(
            f"{part.module}={part.scale!r}{_factors(part)}{',exchanged' if part.module in exchanged else ''}"
            for part in parts
        )

    def _read(self, module: LoraModule) -> None:
        plain = module.path.plain
        name = self._names.find(plain)
        if name in self._stacks or name is None:
            self._read_experts(module)
            return
        self._note_renamings(module, plain, name)
        if name in self._base.linears:
            pair = paired(module, *self._base.linears[name], self._config, self.findings)
            self._keep([LowRank(name, pair.a, pair.b, pair.scale, pair.magnitude)] if pair else [], [module])
        elif self._projections.is_fused(name):
            self._keep(self._projections.read_fused(name, module), [module])
        else:
            self._projections.add_part(name, module)

    def _read_experts(self, module: LoraModule) -> None:
        """….experts, ….experts.base_layer, ….experts.3.gate_proj or ….experts.w1."""
        stack, tail = self._stack_of(module.path.plain)
        if stack is None:
            what, remedy = remedies.for_module(module.path.plain)
            if what == remedies.NO_EXPERTS:
                self._no_experts += [tensor.key for tensor in module.tensors]
                return
            if what == remedies.IMAGES and module.a is not None and module.b is not None and not module.magnitude:
                self._images.append(module)
                return
            self._refuse_module(module, what, remedy)
            return
        self._note_renamings(module, module.path.plain[: len(module.path.plain) - len(tail)].rstrip("."), stack.name)
        if tail in ("", "base_layer"):
            self._parameters.add(stack, module)
        else:
            self._experts.add(stack, tail, module)

    def _read_images(self) -> None:
        """Beside LoRA on the text part, which PEFT targets under the same names; where nothing was trained on images B
        stays zero, as it began."""
        if not self._bound:
            for module in self._images:
                self._refuse_module(module, remedies.IMAGES, remedies.TEXT_ONLY)
            self._images.clear()
        for _ in self._images:
            self.findings.note(f"x {remedies.IMAGES} with a B of zero, which changes nothing.")

    def _refuse_module(self, module: LoraModule, what: str, remedy: str) -> None:
        for tensor in module.tensors:
            self.findings.refuse(f"{shown(tensor.key)}: the base has no linear {module.name} ({what})", remedy)

    def _stack_of(self, plain: str) -> tuple[ExpertStack | None, str]:
        """The experts that the name begins with, and what follows."""
        steps = plain.split(".")
        for length in range(len(steps), max(0, len(steps) - 3), -1):
            name = self._names.find(".".join(steps[:length]))
            if name in self._stacks:
                return self._stacks[name], ".".join(steps[length:])
        return None, ""

    def _note_renamings(self, module: LoraModule, plain: str, name: str) -> None:
        self._names.note_prefix(module.path)
        for sentence in (*module.path.oddities, *self._names.renamings(plain, name)):
            self.findings.note(sentence, len(module.tensors))

    def _keep(self, parts: Sequence[LowRank], of: list[LoraModule]) -> None:
        for part in parts:
            if part.module in self._bound:
                other = self._bound[part.module][1][0]
                problem = f"{of[0].name} and {other.name} are the same linear of this base, {shown(part.module)}"
                self.findings.refuse(problem, remedies.TWICE)
            else:
                self._bound[part.module] = (part, of)

    def _refuse_overlaps(self) -> None:
        """gate_up_proj of an expert is gate_proj and up_proj."""
        for stack in self._stacks:
            for matrix in ("gate_proj", "up_proj"):
                if f"{stack}.gate_up_proj" in self._bound and f"{stack}.{matrix}" in self._bound:
                    problem = f"{shown(stack)}: both gate_up_proj and {matrix}, which is a part of it"
                    self.findings.refuse(problem, remedies.TWICE)

    def _refuse_untouched_targets(self, modules: Sequence[LoraModule]) -> None:
        """Targets that the configuration lists and the base has, but the file holds no tensor for."""
        targets = self._config.target_modules
        listed = [("target_modules", target, target) for target in (targets if isinstance(targets, list) else ())]
        listed += [("target_parameters", it, it.removesuffix(".weight")) for it in self._config.target_parameters]
        sought = {module for _, _, module in listed}
        there = {"target_modules": _among(sought, self._base.linears)}
        matrices = [f"{stack}.{matrix}" for stack in self._stacks for matrix in PARAMETERS]
        there["target_parameters"] = there["target_modules"] | _among(sought, matrices)
        bound = _among(sought, [*self._bound, *(name for module in modules for name in module.path.known_by)])
        for key, target, module in sorted(listed):
            if module in there[key] and module not in bound and not self._is_excluded(key, module):
                problem = f"{key} lists {shown(target)}, but the file has no tensors for it"
                self.findings.refuse(problem, f"copy the whole file, or take out of {key} what was not trained")

    def _is_excluded(self, key: str, target: str) -> bool:
        """Whether the configuration takes away again all linears that it lists by this name."""
        linears = (name for name in self._base.linears if target in endings(name))
        return key == "target_modules" and all(self._config.is_excluded(name) for name in linears)


def _factors(part: LowRank) -> str:
    return "".join(f"*{piece.start}:{piece.factor!r}" for piece in part.b.pieces if piece.factor != 1.0)


def _among(sought: Collection[str], names: Collection[str]) -> set[str]:
    """Those that some name ends in."""
    return {ending for name in names for ending in endings(name) if ending in sought}
