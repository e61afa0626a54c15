"""LoRA at a linear: y += scale * B(A x), over the rows of each adapter."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from kernels.adapter_rows import FEW_TILE_ROWS, AdapterTiles
from kernels.compiled import takes
from kernels.lora import Delta, LoraSite, SiteAdapters, Split, lora, shrunk
from server.model.expert_lora_op import ExpertLoraOp
from server.model.experts import ExpertSpec
from server.model.inputs import CurrentStep, TokenField
from server.model.lora_sites import LoraSites
from server.model.mla import AbsorbedProjection
from server.model.product import Product
from server.model.site_op import Finish


class LoraOp:
    def __init__(
        self, site: LoraSite, adapters: SiteAdapters, step: CurrentStep, product: Product | None, is_lm_head: bool
    ) -> None:
        self._site, self._adapters, self._step = site, adapters, step
        self._product = product  # for its bias, which the model may still move to a device; None: there is none
        self._is_lm_head = is_lm_head

    def begin(self, x: Tensor) -> Finish | None:
        rows = self._step.inputs.rows
        if not self._acts:
            return None
        return partial(self._add, x, rows.sampled if self._is_lm_head else rows.tiles, rows.shape.rank)

    @property
    def _acts(self) -> bool:
        rows = self._step.inputs.rows
        # what a captured batch holds is read from the device
        return rows.shape.rank > 0 and (rows.at_all_sites or bool(self._adapters.by_slot))

    def defers(self, x: Tensor) -> bool:
        """Where kernels compute, in steps of few rows: at prefill launches cost nothing to speak of."""
        cover = self._step.inputs.rows.cover
        if cover is None or cover.tile_rows > FEW_TILE_ROWS or not takes(x) or not self._acts:
            return False
        return not (self._is_lm_head or self._site.own_inputs or self._site.transposed)

    def deferred(self, x: Tensor) -> Delta:
        rows, it = self._step.inputs.rows, self._adapters
        assert rows.cover is not None and it.table is not None and it.offsets is not None
        z = shrunk(x.reshape(-1, x.shape[-1]), it, rows.tiles, rows.shape.rank)
        return Delta(z, it.table, it.offsets, rows.cover, self._product.bias if self._product is not None else None)

    def _add(self, x: Tensor, tiles: AdapterTiles, max_rank: int, y: Tensor) -> None:
        depth = x.shape[-1] * (len(self._site.widths) if self._site.own_inputs else 1)
        bias = self._product.bias if self._product is not None else None  # what y holds already, for gains
        lora(y, x.reshape(-1, depth), self._site, self._adapters, tiles, max_rank, bias)


class LoraOps:
    token_fields: Sequence[TokenField] = ()

    def __init__(self, sites: LoraSites, step: CurrentStep) -> None:
        self._sites, self._step = sites, step

    def at_linears(self, names: Sequence[str], product: Product, is_lm_head: bool) -> LoraOp:
        site = LoraSite(product.widths)
        for index, name in enumerate(names):
            self._sites.bind(name, [(site, _slice(index))], product.dtype, partial(product.rows, index))
        return self._op(site, product, is_lm_head)

    def at_absorbed(self, name: str, projection: AbsorbedProjection) -> tuple[LoraOp, LoraOp, LoraOp]:
        it = projection
        gains = LoraSite((it.key_dim,) * it.heads, own_inputs=True)
        # (B_h^T q) A, where a plain site has B (A x): the same two matrices, transposed and in the other order
        queries = LoraSite((it.latent,) * it.heads, own_inputs=True, transposed=True)
        values = LoraSite((it.value_dim,) * it.heads, own_inputs=True)
        sites = [(gains, it.split_for_gains), (queries, it.split_for_queries), (values, it.split_for_values)]
        self._sites.bind(name, sites, it.rows().dtype, it.rows)
        return self._op(gains), self._op(queries), self._op(values)

    def at_experts(self, spec: ExpertSpec, dtype: torch.dtype) -> ExpertLoraOp:
        return ExpertLoraOp(spec, dtype, self._sites, self._step)

    def _op(self, site: LoraSite, product: Product | None = None, is_lm_head: bool = False) -> LoraOp:
        return LoraOp(site, self._sites.open(site), self._step, product, is_lm_head)


def _slice(index: int) -> Split:
    return lambda weights: [(index, weights)]
