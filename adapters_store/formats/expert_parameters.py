"""LoRA on the parameters that hold one matrix of all routed experts of a layer: PEFT's `target_parameters`.

    ….experts.lora_A.weight, or ….experts.base_layer.lora_A.weight      A [M * r, in]     row e * r + j
    the same with lora_B                                                B [out, r * M]    column j * M + e

Which matrix it is the key does not say (a second one is wrapped around the first, so both exist where both are tuned);
the shapes do. PEFT took the parameter of M experts for [M, in, out]. Most bases store [M, out, in], so that before
0.19.1 A and B had changed places: A [M * r, out], B [in, r * M], and each expert's change is (B_e A_e) transposed.
Shapes tell this too, but for square matrices, which are read as the file's others are, or else as the version says.
"""

import re

import msgspec

from adapters_store.base_spec import ExpertStack
from adapters_store.errors import shown
from adapters_store.formats import remedies
from adapters_store.formats.lora_tensors import OTHER_SHAPES, LoraModule, note_pruned, refuse_half
from adapters_store.formats.peft_config import LoraConfig
from adapters_store.formats.reading import Findings
from adapters_store.parts import LowRank, TensorRef, Whole

_VERSION = re.compile(r"(\d{1,4})\.(\d{1,4})\.(\d{1,4})(\.dev)?")
PARAMETERS = ("gate_up_proj", "down_proj")
_TRANSPOSED = "x in and out of routed experts' matrices exchanged, as PEFT before 0.19.1 writes them."


class _Read(msgspec.Struct, gc=False):
    """What a pair of tensors turned out to be. `exchanged` is None where the matrix is square."""

    module: LoraModule
    stack: ExpertStack
    matrix: str
    exchanged: bool | None


class ExpertParameters:
    """Reads the tensors of target_parameters, once all are known: those that shapes tell of decide on the others."""

    def __init__(self, config: LoraConfig, findings: Findings) -> None:
        self._config, self._findings = config, findings
        self._found: list[_Read] = []
        self.exchanged: list[str] = []  # modules of the base

    def add(self, stack: ExpertStack, module: LoraModule) -> None:
        a, b = module.a, module.b
        if module.magnitude is not None or (self._config.use_dora and a is not None):
            self._findings.refuse(f"{module.name}: DoRA on routed experts", remedies.DORA_ON_EXPERTS)
        elif a is None or b is None:
            refuse_half(module, self._findings)
        else:
            found = _told_by_shape(stack, a, b)
            if found is None:
                shapes = f"A {list(a.shape)} and B {list(b.shape)}"
                fits = " or ".join(f"{name} {list(shape)}" for name, shape in _shapes(stack).items())
                problem = f"{module.name}: {shapes} are no LoRA on {stack.num_experts} experts' {fits}"
                self._findings.refuse(problem, OTHER_SHAPES)
            else:
                self._found.append(_Read(module, stack, *found))

    def read(self) -> list[tuple[LowRank, list[LoraModule]]]:
        told = {read.exchanged for read in self._found if read.exchanged is not None}
        square = told.pop() if len(told) == 1 else None
        parts = [(self._part(read, square), [read.module]) for read in self._found]
        return [(part, modules) for part, modules in parts if part is not None]

    def _part(self, read: _Read, others: bool | None) -> LowRank | None:
        exchanged = read.exchanged
        if exchanged is None:
            exchanged = (
                _exchanged_by_version(self._config.peft_version, read.stack.transposed) if others is None else others
            )
        if exchanged is None:
            self._findings.refuse(
                f"{read.module.name}: {read.matrix} is square, so its shape does not tell in from out",
                "set peft_version in adapter_config.json to the version of PEFT that wrote the adapter (0.17.1, say)",
            )
            return None
        names = [f"{_experts(name)}.{read.matrix}" for name in read.module.path.known_by]
        if not self._config.lists_parameter(names):
            self._findings.refuse(
                f"{read.module.name}: its shape is that of {read.matrix}, which target_parameters does not list",
                "list the parameter in target_parameters as it was when the adapter was trained",
            )
            return None
        return self._scaled(read, exchanged, names)

    def _scaled(self, read: _Read, exchanged: bool, names: list[str]) -> LowRank | None:
        a, b = read.module.tensors
        rank, scale = self._config.rank_and_scale_of_parameter(names)
        stored = a.shape[0] // read.stack.num_experts
        if stored > rank:
            self._findings.refuse(
                f"{read.module.name}: rank {stored} of {shown(names[0])}, which the configuration gives {rank}",
                "if the ranks differ from one parameter to another, list them in rank_pattern by the parameter's name",
            )
            return None
        if stored < rank:
            note_pruned(self._findings)
        name = f"{read.stack.name}.{read.matrix}"
        if exchanged:
            self._findings.note(_TRANSPOSED)
            self.exchanged.append(name)
        return _low_rank(name, a, b, read.stack.num_experts, exchanged, scale)


def _low_rank(name: str, a: TensorRef, b: TensorRef, num_experts: int, exchanged: bool, scale: float) -> LowRank:
    """With a [M, rank, in] and b [M, out, rank], whichever of the two tensors each is in."""
    rank = a.shape[0] // num_experts
    by_rows, by_columns = (num_experts, rank, a.shape[1]), (b.shape[0], rank, num_experts)
    if exchanged:
        return LowRank(name, _seen(b, by_columns, (2, 1, 0)), _seen(a, by_rows, (0, 2, 1)), scale)
    return LowRank(name, TensorRef(a.file, a.key, by_rows, a.dtype, a.offset), _seen(b, by_columns, (2, 0, 1)), scale)


def _seen(tensor: TensorRef, shape: tuple[int, int, int], order: tuple[int, int, int]) -> TensorRef:
    ordered = tuple(shape[dimension] for dimension in order)
    return TensorRef(tensor.file, tensor.key, ordered, tensor.dtype, tensor.offset, Whole(shape, (0, 0, 0), order))


def _shapes(stack: ExpertStack) -> dict[str, tuple[int, int]]:
    return {matrix: stack.matrices[f"{stack.name}.{matrix}"] for matrix in PARAMETERS}


def _told_by_shape(stack: ExpertStack, a: TensorRef, b: TensorRef) -> tuple[str, bool | None] | None:
    """The matrix, and whether A and B have changed places."""
    if not len(a.shape) == len(b.shape) == 2 or a.shape[0] != b.shape[1] or a.shape[0] % stack.num_experts:
        return None
    for matrix, (out_features, in_features) in _shapes(stack).items():
        widths = (b.shape[0], a.shape[1])
        if widths == (out_features, in_features):
            return matrix, None if out_features == in_features else False
        if widths == (in_features, out_features):
            return matrix, True
    return None


def _exchanged_by_version(version: str, is_transposed: bool) -> bool | None:
    """What PEFT did with parameters stored as [M, out, in], or, transposed, as [M, in, out]: none changed places there,
    but under 0.19.0, which took the one for the other where Transformers told it of them."""
    match = _VERSION.match(version)
    if match is None:
        return False if is_transposed and not version else None
    number, is_between = (int(match[1]), int(match[2]), int(match[3])), match[4] is not None
    if number > (0, 19, 1) or (number == (0, 19, 1) and not is_between):
        return False
    if is_transposed:
        return None if number >= (0, 18, 2) else False
    return None if number == (0, 19, 1) else True


def _experts(name: str) -> str:
    """The experts' module, as PEFT knew it before it wrapped it."""
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return name
