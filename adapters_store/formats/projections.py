"""Linears that some models have in one and others in parts: the rows of q, k and v, or of gate and up, one after
another.

In one in the file, in parts in the base: every part has the same A, and its rows of B.

In parts in the file, in one in the base: one rank beside the other, so that B is block-diagonal.

    q: A_q [r, in], B_q [Q, r]      A = A_q    B = B_q  .      rows 0 to Q
    v: A_v [s, in], B_v [V, s]          A_v         .   .      rows Q to Q + K: those of k, which is left alone
                                                    .   B_v    rows Q + K to the end
"""

from collections.abc import Iterable

from adapters_store.base_spec import BaseSpec
from adapters_store.errors import shown
from adapters_store.formats import remedies
from adapters_store.formats.lora_tensors import LoraModule, Pair, one_scale, paired
from adapters_store.formats.peft_config import LoraConfig
from adapters_store.formats.reading import Findings
from adapters_store.parts import Assembled, LowRank, Operand, Piece, TensorRef, Whole

# rows in this order
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_FUSED_OF = {part: fused for fused, parts in FUSED.items() for part in parts}


class Projections:
    """Reads what the file has in one and the base in parts, or the other way round."""

    def __init__(self, base: BaseSpec, config: LoraConfig, findings: Findings) -> None:
        self._linears, self._config, self._findings = base.linears, config, findings
        self._fused = base.fused
        self._split: dict[str, dict[str, LoraModule]] = {}  # a fused linear of the base -> parts in the file
        self.names = set(_other_names(base))

    def read_fused(self, name: str, module: LoraModule) -> list[LowRank]:
        """The parts of a linear that the file has in one."""
        parent, _, fused = name.rpartition(".")
        parts = [f"{parent}.{part}" for part in FUSED[fused]]
        widths = [self._linears[part][0] for part in parts]
        pair = paired(module, sum(widths), self._linears[parts[0]][1], self._config, self._findings)
        if pair is None:
            return []
        self._findings.note(f"x {fused} read as {', '.join(FUSED[fused])}, by its rows.")
        starts = [sum(widths[:index]) for index in range(len(parts))]
        return [
            LowRank(part, pair.a, _rows(pair.b, start, width), pair.scale,
                    pair.magnitude and _rows(pair.magnitude, start, width))
            for part, start, width in zip(parts, starts, widths, strict=True)
        ]  # fmt: skip

    def is_fused(self, name: str) -> bool:
        return name.rpartition(".")[2] in FUSED

    def add_part(self, name: str, module: LoraModule) -> None:
        """One part of a linear that the base has in one."""
        parent, _, part = name.rpartition(".")
        modules = self._split.setdefault(f"{parent}.{_FUSED_OF[part]}", {})
        if part in modules:
            problem = f"{module.name} and {modules[part].name} are the same rows of {_FUSED_OF[part]}"
            self._findings.refuse(problem, remedies.TWICE)
        modules[part] = module

    def read_parts(self) -> list[tuple[LowRank, list[LoraModule]]]:
        """What the parts that were added come to, with what each was made of."""
        found = ((name, parts, self._assembled(name, parts)) for name, parts in sorted(self._split.items()))
        return [(part, list(modules.values())) for _, modules, part in found if part is not None]

    def _assembled(self, name: str, modules: dict[str, LoraModule]) -> LowRank | None:
        out_features, in_features = self._linears[name]
        fused = name.rpartition(".")[2]
        pairs: list[Pair] = []
        starts: list[int] = []
        row = 0
        for part, width in zip(FUSED[fused], self._fused[name], strict=True):
            if part in modules:
                pair = paired(modules[part], width, in_features, self._config, self._findings)
                if pair is None:
                    return None
                pairs.append(pair)
                starts.append(row)
            row += width
        told = ", ".join(part for part in FUSED[fused] if part in modules)
        if self._config.use_dora and len(pairs) < len(FUSED[fused]):
            self._findings.refuse(
                f"{shown(name)}: magnitudes of {told} only, and it is one linear here",
                f"train with DoRA on all of {', '.join(FUSED[fused])}, or merge the adapter into its base",
            )
            return None
        self._findings.note(f"x {told} read as rows of {fused}.")
        return _joined(name, pairs, starts, out_features, in_features)


def _other_names(base: BaseSpec) -> Iterable[str]:
    """What a file may call a linear that the base has otherwise."""
    for name in base.linears:
        parent, _, last = name.rpartition(".")
        fused = _FUSED_OF.get(last)
        if fused and f"{parent}.{fused}" not in base.linears:
            if all(f"{parent}.{part}" in base.linears for part in FUSED[fused]):
                yield f"{parent}.{fused}"
        if name in base.fused:
            yield from (f"{parent}.{part}" for part in FUSED[last])


def _rows(tensor: TensorRef, start: int, count: int) -> TensorRef:
    """`count` of its rows from `start` on."""
    shape = (count, *tensor.shape[1:])
    whole = Whole(tensor.shape, (start,) + (0,) * (len(shape) - 1))
    return TensorRef(tensor.file, tensor.key, shape, tensor.dtype, tensor.offset, whole)


def _joined(name: str, pairs: list[Pair], starts: list[int], out_features: int, in_features: int) -> LowRank:
    a: list[Piece] = []
    b: list[Piece] = []
    magnitude: list[Piece] = []
    rank = 0
    scale, factors = one_scale(pair.scale for pair in pairs)
    for pair, start, factor in zip(pairs, starts, factors, strict=True):
        a.append(Piece(pair.a, (rank, 0)))
        b.append(Piece(pair.b, (start, rank), factor))
        if pair.magnitude is not None:
            magnitude.append(Piece(pair.magnitude, (start,)))
        rank += pair.rank
    whole: Operand = pairs[0].a if len(pairs) == 1 else Assembled((rank, in_features), tuple(a))
    return LowRank(
        name,
        whole,
        Assembled((out_features, rank), tuple(b)),
        scale,
        Assembled((out_features,), tuple(magnitude)) if magnitude else None,
    )
