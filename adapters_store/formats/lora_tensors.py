"""The tensors of a LoRA, put together by the module that they act on."""

import re
from collections import Counter
from collections.abc import Iterable

import msgspec

from adapters_store.errors import InvalidAdapter, shown
from adapters_store.formats import remedies
from adapters_store.formats.names import ModulePath, module_path
from adapters_store.formats.peft_config import LoraConfig
from adapters_store.formats.reading import Findings
from adapters_store.parts import TensorRef

_SIDE = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
# PEFT saves it without `.weight`, and others as they find it in the model
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(?:\.(?!weight$)(?P<adapter>[^.]+))?(?:\.weight)?")
OTHER_SHAPES = "serve the adapter on the base that it was trained on; its shapes are those of another"


class LoraModule(msgspec.Struct, gc=False):
    """What the file holds for one module."""

    path: ModulePath
    a: TensorRef | None = None
    b: TensorRef | None = None
    magnitude: TensorRef | None = None

    @property
    def name(self) -> str:
        return shown(self.path.plain)

    @property
    def tensors(self) -> list[TensorRef]:
        return [tensor for tensor in (self.a, self.b, self.magnitude) if tensor is not None]


class Pair(msgspec.Struct, frozen=True, gc=False):
    """A and B that fit each other and the configuration."""

    a: TensorRef
    b: TensorRef
    magnitude: TensorRef | None
    rank: int
    scale: float


def by_module(tensors: Iterable[TensorRef], findings: Findings) -> list[LoraModule]:
    modules: dict[str, LoraModule] = {}
    adapters: Counter[str | None] = Counter()
    for tensor in tensors:
        match = _SIDE.fullmatch(tensor.key) or _MAGNITUDE.fullmatch(tensor.key)
        if match is None:
            what, remedy = remedies.for_tensor(tensor.key)
            findings.refuse(f"{shown(tensor.key)}: not the A or B of a LoRA linear but {what}", remedy)
            continue
        adapters[match["adapter"]] += 1
        module = modules.get(match["module"])
        if module is None:
            module = modules[match["module"]] = LoraModule(module_path(match["module"]))
        if match.re is _MAGNITUDE:
            if module.magnitude is not None:
                findings.refuse(f"{shown(tensor.key)}: a second magnitude of the module", "keep one of the two")
            module.magnitude = tensor
        elif match["side"] == "A":
            module.a = tensor
        else:
            module.b = tensor
    _refuse_two_names(adapters)  # a side that came twice came under two names
    return list(modules.values())


def _refuse_two_names(names: Counter[str | None]) -> None:
    """`lora_A.default` names an adapter; PEFT loads those of one name, and files have none as a rule."""
    if len(names) < 2:
        return
    told = ", ".join(f"{count} of {shown(name)!r}" for name, count in sorted((n, c) for n, c in names.items() if n)[:4])
    told += f", {names[None]} without a name" if names[None] else ""
    raise InvalidAdapter(
        f"the file holds tensors of more than one adapter ({told}): save each adapter in a directory of its own "
        "(PEFT: save_pretrained with selected_adapters)"
    )


def paired(
    module: LoraModule, out_features: int, in_features: int, config: LoraConfig, findings: Findings
) -> Pair | None:
    """A [rank, in] and B [out, rank] of a linear, or None with a line that says what is wrong."""
    a, b = module.a, module.b
    if a is None or b is None:
        refuse_half(module, findings)
        return None
    rank, scale = config.rank_and_scale(module.path.known_by)
    stored = stored_rank(a, b)
    if stored is not None and stored < rank:
        note_pruned(findings)
        rank = stored
    for side, tensor, expected in (("A", a, (rank, in_features)), ("B", b, (out_features, rank))):
        if tensor.shape != expected:
            problem = f"{module.name}.lora_{side}: shape {list(tensor.shape)}, expected {list(expected)}"
            findings.refuse(problem, remedies.RANKS if stored != rank else OTHER_SHAPES)
            return None
    if not _has_magnitude_as_configured(module, out_features, config, findings):
        return None
    return Pair(a, b, module.magnitude, rank, scale)


def one_scale(scales: Iterable[float]) -> tuple[float, list[float]]:
    """What becomes one part has one scale, the largest: that, and what each B must be multiplied with for its own."""
    own = list(scales)
    largest = max(own, key=abs)
    return largest, [scale / largest if largest else 1.0 for scale in own]


def refuse_half(module: LoraModule, findings: Findings) -> None:
    """A or B is missing, or both are and the magnitude is alone."""
    there, missing = ("A", "B") if module.b is None else ("B", "A")
    if module.a is module.b is None:
        there = "magnitude_vector"
    findings.refuse(f"{module.name}: lora_{there} without lora_{missing}", remedies.INCOMPLETE)


def stored_rank(a: TensorRef, b: TensorRef) -> int | None:
    """The rank that both tensors have, if it is one."""
    return a.shape[0] if len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1] else None


def note_pruned(findings: Findings) -> None:
    """Components that were removed do not change what the others were trained with: the configured scale."""
    findings.note(
        "x a rank below the configuration's, of which rank_pattern says nothing: read as pruned after training, at the "
        "scale of the configured rank. If it was trained at its own rank, list that in rank_pattern."
    )


def _has_magnitude_as_configured(module: LoraModule, out_features: int, config: LoraConfig, findings: Findings) -> bool:
    magnitude = module.magnitude
    if magnitude is None:
        if config.use_dora:
            problem = f"{module.name}: no lora_magnitude_vector, though use_dora is set"
            findings.refuse(problem, "save the adapter again with PEFT; if it is no DoRA, set use_dora to false")
        return not config.use_dora
    if not config.use_dora:
        problem = f"{shown(magnitude.key)}: DoRA's magnitude, though use_dora is not set"
        findings.refuse(problem, "set use_dora to true if the adapter was trained with DoRA, else remove the tensor")
        return False
    if magnitude.shape != (out_features,):
        problem = f"{module.name}.lora_magnitude_vector: shape {list(magnitude.shape)}, expected {[out_features]}"
        sizes = [size for size in magnitude.shape if size != 1]
        remedy = "save it with one dimension" if sizes == [out_features] else OTHER_SHAPES
        findings.refuse(problem, remedy)
        return False
    return True
