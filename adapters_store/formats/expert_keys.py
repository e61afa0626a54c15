"""LoRA on routed experts under names of their own, in two layouts.

One expert a key, as Transformers 4 names them (its Mixtral says w1, w3 and w2 for gate, up and down):

    ….mlp.experts.3.gate_proj.lora_A.weight     [rank, in]       experts that have none keep the base's matrix
    ….mlp.experts.3.gate_proj.lora_B.weight     [out, rank]

One matrix a key, as Tinker and SGLang write them; a side that all experts share has 1 in place of M:

    ….mlp.experts.w1.lora_A.weight              [M or 1, rank, in]
    ….mlp.experts.w1.lora_B.weight              [M or 1, out, rank]
"""

import re

from adapters_store.base_spec import ExpertStack
from adapters_store.errors import shown
from adapters_store.formats import remedies
from adapters_store.formats.lora_tensors import (
    OTHER_SHAPES,
    LoraModule,
    Pair,
    note_pruned,
    one_scale,
    paired,
    refuse_half,
)
from adapters_store.formats.peft_config import LoraConfig
from adapters_store.formats.reading import Findings
from adapters_store.parts import Assembled, LowRank, Piece, TensorRef

_TAIL = re.compile(r"(?:(?P<expert>0|[1-9][0-9]{0,5})\.)?(?P<matrix>gate_proj|up_proj|down_proj|w1|w3|w2)")
_MATRIX = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
Parts = list[tuple[LowRank, list[LoraModule]]]


class ExpertKeys:
    """Reads experts by their names, once all are known."""

    def __init__(self, config: LoraConfig, findings: Findings) -> None:
        self._config, self._findings = config, findings
        self._experts: dict[str, dict[int, LoraModule]] = {}  # matrix -> by expert
        self._together: Parts = []
        self._stacks: dict[str, ExpertStack] = {}  # by matrix

    def add(self, stack: ExpertStack, tail: str, module: LoraModule) -> None:
        """`tail` is what stands behind the experts' name."""
        match = _TAIL.fullmatch(tail)
        if match is None:
            what = f"{module.name}: no matrix of routed experts is called {shown(tail)}"
            self._findings.refuse(what, remedies.EXPERT_NAMES)
            return
        name = f"{stack.name}.{_MATRIX.get(match['matrix'], match['matrix'])}"
        if name not in stack.matrices:
            self._findings.refuse(
                f"{module.name}: this base has gate and up interleaved in one matrix", remedies.INTERLEAVED
            )
        elif module.magnitude is not None or (self._config.use_dora and module.a is not None):
            self._findings.refuse(f"{module.name}: DoRA on routed experts", remedies.DORA_ON_EXPERTS)
        elif match["expert"] is None:
            self._add_together(stack, name, module)
        elif int(match["expert"]) >= stack.num_experts:
            problem = f"{module.name}: the base has {stack.num_experts} experts there"
            self._findings.refuse(problem, OTHER_SHAPES)
        else:
            self._add_expert(stack, name, int(match["expert"]), module)

    def read(self) -> Parts:
        parts = [(self._assembled(name, experts), list(experts.values())) for name, experts in self._experts.items()]
        return self._together + [(part, modules) for part, modules in parts if part is not None]

    def _add_expert(self, stack: ExpertStack, name: str, expert: int, module: LoraModule) -> None:
        experts = self._experts.setdefault(name, {})
        if expert in experts:
            what = f"{module.name}: expert {expert} has {experts[expert].name} too, the same matrix"
            self._findings.refuse(what, remedies.TWICE)
            return
        self._stacks[name] = stack
        experts[expert] = module

    def _assembled(self, name: str, experts: dict[int, LoraModule]) -> LowRank | None:
        stack = self._stacks[name]
        out_features, in_features = stack.matrices[name]
        pairs = {
            expert: pair
            for expert, module in sorted(experts.items())
            if (pair := paired(module, out_features, in_features, self._config, self._findings)) is not None
        }
        if len(pairs) < len(experts):
            return None
        self._findings.note("tensors of single experts were read together, by matrix.", 2 * len(pairs))
        if len(pairs) < stack.num_experts:
            self._findings.note(
                "x no tensors for an expert beside others of its layer that have some: it stays the base's.",
                stack.num_experts - len(pairs),
            )
        return _assembled(name, pairs, stack.num_experts, out_features, in_features)

    def _add_together(self, stack: ExpertStack, name: str, module: LoraModule) -> None:
        a, b = module.a, module.b
        if a is None or b is None:
            refuse_half(module, self._findings)
            return
        rank, scale = self._config.rank_and_scale(module.path.known_by)
        stored = a.shape[1] if len(a.shape) == 3 else 0
        (out_features, in_features), counts = stack.matrices[name], (1, stack.num_experts)
        fits = any(a.shape == (count, stored, in_features) for count in counts)
        fits &= any(b.shape == (count, out_features, stored) for count in counts)
        if not fits or stored > rank:
            first = f"{stack.num_experts} or 1"
            expected = f"[{first}, {rank}, {in_features}] and [{first}, {out_features}, {rank}]"
            problem = f"{module.name}: A {list(a.shape)} and B {list(b.shape)}, expected {expected}"
            self._findings.refuse(problem, OTHER_SHAPES if not fits else remedies.RANKS)
            return
        if stored < rank:
            note_pruned(self._findings)
        self._findings.note("tensors of all experts' matrices were read as Tinker and SGLang write them.", 2)
        self._together.append((LowRank(name, a, b, scale), [module]))


def _assembled(name: str, pairs: dict[int, Pair], num_experts: int, out_features: int, in_features: int) -> LowRank:
    """Ranks below the highest are filled up with zeros, and so are experts that have none."""
    rank = max(pair.rank for pair in pairs.values())
    scale, factors = one_scale(pair.scale for pair in pairs.values())
    a = tuple(Piece(_one_of_many(pair.a), (expert, 0, 0)) for expert, pair in pairs.items())
    b = tuple(
        Piece(_one_of_many(pair.b), (expert, 0, 0), factor)
        for (expert, pair), factor in zip(pairs.items(), factors, strict=True)
    )
    return LowRank(
        name,
        Assembled((num_experts, rank, in_features), a),
        Assembled((num_experts, out_features, rank), b),
        scale,
    )


def _one_of_many(tensor: TensorRef) -> TensorRef:
    """The same bytes as a stack of one."""
    return TensorRef(tensor.file, tensor.key, (1, *tensor.shape), tensor.dtype, tensor.offset)
