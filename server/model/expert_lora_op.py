"""LoRA inside routed experts: an adapter's own update of each expert that its tokens are sent to."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.adapter_rows import AdapterRows
from kernels.expert_route import Routed
from kernels.expert_tiles import ExpertTiles, expert_tiles
from kernels.lora import LoraSite, LoraWeights, SiteAdapters, expert_lora
from server.model.experts import ExpertFinish, ExpertSpec
from server.model.inputs import CurrentStep
from server.model.lora_sites import LoraSites


class _Place(NamedTuple):
    """Where adapters act behind one of an expert's two products."""

    site: LoraSite
    adapters: SiteAdapters


class ExpertLoraOp:
    """One for the experts of a layer: two sites, behind the product of gate and up and behind that of down.

    Gate and up are two slices, so that adapters may have either or both; where the base interleaves them they are one.
    """

    def __init__(self, spec: ExpertSpec, dtype: torch.dtype, sites: LoraSites, step: CurrentStep) -> None:
        self._num_experts, self._step = spec.num_experts, step
        inner = spec.intermediate_size
        widths = (2 * inner,) if spec.interleaved else (inner, inner)
        gate_up, down = (LoraSite(it, experts=spec.num_experts) for it in (widths, (spec.hidden_size,)))
        self._gate_up, self._down = _Place(gate_up, sites.open(gate_up)), _Place(down, sites.open(down))

        def bind(matrix: str, site: LoraSite, slices: dict[int, slice]) -> None:
            """slices: which rows of the matrix each slice of the site is."""
            sites.bind(f"{spec.name}.{matrix}", [(site, partial(_split, spec.num_experts, slices))], dtype)

        bind("down_proj", down, {0: slice(None)})
        if spec.interleaved:
            bind("gate_up_proj", gate_up, {0: slice(None)})
        else:
            bind("gate_up_proj", gate_up, {0: slice(None, inner), 1: slice(inner, None)})
            bind("gate_proj", gate_up, {0: slice(None)})
            bind("up_proj", gate_up, {1: slice(None)})

    def begin(self, routed: Routed) -> ExpertFinish | None:
        rows = self._step.inputs.rows
        if not rows.shape.expert_rank:
            return None
        if not (rows.at_all_sites or self._gate_up.adapters.by_slot or self._down.adapters.by_slot):
            return None
        assert rows.slots is not None, "a step with adapters says whose each token is"
        return _Finish(self._gate_up, self._down, routed, expert_tiles(routed, rows.slots, self._num_experts), rows)


class _Finish(NamedTuple):
    """Implements ExpertFinish for one step."""

    at_gate_up: _Place
    at_down: _Place
    routed: Routed
    tiles: ExpertTiles
    rows: AdapterRows

    def gate_up(self, products: Tensor, x: Tensor) -> None:
        self._add(products, x, self.at_gate_up, gathers=True)

    def down(self, rows: Tensor, h: Tensor) -> None:
        self._add(rows, h, self.at_down, gathers=False)

    def _add(self, y: Tensor, x: Tensor, at: _Place, gathers: bool) -> None:
        expert_lora(y, x, at.site, at.adapters, self.routed, self.tiles, gathers, self.rows.shape.expert_rank,
                    self.rows.tiles.counters)  # fmt: skip


def _split(experts: int, slices: dict[int, slice], weights: LoraWeights) -> list[tuple[int, LoraWeights]]:
    """What is shared by all experts is seen as each one's."""
    a, b = (it.expand(experts, -1, -1) for it in (weights.a, weights.b))
    return [(index, LoraWeights(a, b[:, rows], weights.scale)) for index, rows in slices.items()]
