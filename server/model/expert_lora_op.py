"""LoRA inside routed experts: an adapter's own update of each expert that its tokens are sent to."""

from functools import partial

import torch
from torch import Tensor

from kernels.expert_route import Routed
from kernels.expert_tiles import ExpertTiles, expert_tiles
from kernels.lora import LoraSite, LoraWeights, SiteAdapters, expert_lora
from server.model.experts import ExpertFinish, ExpertSpec
from server.model.inputs import CurrentStep
from server.model.lora_sites import LoraSites

Slices = list[tuple[int, LoraWeights]]


class ExpertLoraOp:
    """One for the experts of a layer: two sites, behind the product of gate and up and behind that of down.

    Gate and up are two slices, so that adapters may have either or both; where the base interleaves them they are one.
    """

    def __init__(self, spec: ExpertSpec, dtype: torch.dtype, sites: LoraSites, step: CurrentStep) -> None:
        self._spec, self._step = spec, step
        inner = spec.intermediate_size
        widths = (2 * inner,) if spec.interleaved else (inner, inner)
        self._gate_up = LoraSite(widths, experts=spec.num_experts)
        self._down = LoraSite((spec.hidden_size,), experts=spec.num_experts)
        self._at_gate_up, self._at_down = sites.open(self._gate_up), sites.open(self._down)

        def bind(matrix: str, site: LoraSite, slices: dict[int, slice]) -> None:
            """slices: which rows of the matrix each slice of the site is."""
            sites.bind(f"{spec.name}.{matrix}", [(site, partial(_split, spec.num_experts, slices))], dtype)

        bind("down_proj", self._down, {0: slice(None)})
        if spec.interleaved:
            bind("gate_up_proj", self._gate_up, {0: slice(None)})
        else:
            bind("gate_up_proj", self._gate_up, {0: slice(None, inner), 1: slice(inner, None)})
            bind("gate_proj", self._gate_up, {0: slice(None)})
            bind("up_proj", self._gate_up, {1: slice(None)})

    def begin(self, routed: Routed) -> ExpertFinish | None:
        rows = self._step.inputs.rows
        if not rows.shape.expert_rank or rows.slots is None:
            return None
        if not (rows.at_all_sites or self._at_gate_up.by_slot or self._at_down.by_slot):
            return None
        return _Finish(self, routed, expert_tiles(routed, rows.slots, self._spec.num_experts))

    def add_to_gate_up(self, products: Tensor, x: Tensor, routed: Routed, tiles: ExpertTiles) -> None:
        self._add(products, x, self._gate_up, self._at_gate_up, routed, tiles, gathers=True)

    def add_to_down(self, rows: Tensor, h: Tensor, routed: Routed, tiles: ExpertTiles) -> None:
        self._add(rows, h, self._down, self._at_down, routed, tiles, gathers=False)

    def _add(
        self, y: Tensor, x: Tensor, site: LoraSite, adapters: SiteAdapters, routed: Routed, tiles: ExpertTiles,
        gathers: bool,
    ) -> None:  # fmt: skip
        rows = self._step.inputs.rows
        expert_lora(y, x, site, adapters, routed, tiles, gathers, rows.shape.expert_rank, rows.tiles.counters)


class _Finish:
    """Implements ExpertFinish for one step."""

    def __init__(self, op: ExpertLoraOp, routed: Routed, tiles: ExpertTiles) -> None:
        self._op, self._routed, self._tiles = op, routed, tiles

    def gate_up(self, products: Tensor, x: Tensor) -> None:
        self._op.add_to_gate_up(products, x, self._routed, self._tiles)

    def down(self, rows: Tensor, h: Tensor) -> None:
        self._op.add_to_down(rows, h, self._routed, self._tiles)


def _split(experts: int, slices: dict[int, slice], weights: LoraWeights) -> Slices:
    """What is shared by all experts is seen as each one's."""
    a, b = (it.expand(experts, -1, -1) for it in (weights.a, weights.b))
    return [(index, LoraWeights(a, b[:, rows], weights.scale)) for index, rows in slices.items()]
