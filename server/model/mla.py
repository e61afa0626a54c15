"""Multi-head latent attention over its latents: what DeepSeek-V2 and V3 cache is one short vector a token.

The up-projections of keys and values are moved to the other side of the attention ("absorbed"): queries are taken into
the latent space, attention runs there with one key head, and its result is taken out again. For DeepSeek-V2-Lite the
cache holds 512 + 64 numbers a token and layer instead of 16 * (192 + 128).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.latent_prep import LatentNorm, Turns, latent_prep
from kernels.lora import LoraWeights
from kernels.paged_attention import AttentionBatch, DeviceBatch, paged_attention
from kernels.store_kv import store_latent
from server.model.attention import MakeKV, clear
from server.model.expanded_prefill import ExpandedStep, LatentSizes
from server.model.families import Foreign
from server.model.inputs import CurrentStep, StepInputs
from server.model.masks import Visible
from server.model.probe import KVShape
from server.model.site_op import Finish, SiteOp, begin_all


def is_latent(attention: Foreign) -> bool:
    return hasattr(attention, "expand_kv") and hasattr(attention, "kv_b_proj")


def latent_shape(attention: Foreign) -> KVShape:
    """What a token caches: one head of latent and rotated key, and no values beside."""
    return KVShape(1, attention.kv_lora_rank + attention.qk_rope_head_dim, 0)


class AbsorbedProjection:
    """kv_b_proj [heads * (key_dim + value_dim), latent] of one layer, as queries and results pass through it.

    Adapters of it act on both sides, and on every head with rows of its own: sites with a slice a head. A gain scales
    rows of the projection. Where results leave, those are what comes out. Where queries enter, they are what goes in,
    so there gains have a site of their own before.
    """

    def __init__(self, attention: Foreign) -> None:
        self._attention = attention
        self.heads: int = attention.num_heads
        self.latent: int = attention.kv_lora_rank
        self.key_dim: int = attention.qk_nope_head_dim
        self.value_dim: int = attention.v_head_dim

    @property
    def out_features(self) -> int:
        return self.heads * (self.key_dim + self.value_dim)

    def rows(self) -> Tensor:
        """[heads * (key_dim + value_dim), latent]"""
        weight: Tensor = self._attention.kv_b_proj.weight
        return weight

    def _weight(self) -> Tensor:
        return self.rows().view(self.heads, self.key_dim + self.value_dim, self.latent)

    def queries_in(self, query: Tensor) -> Tensor:
        """query [T, H, key_dim] -> [T, H, latent]."""
        return torch.bmm(query.transpose(0, 1), self._weight()[:, : self.key_dim]).transpose(0, 1)

    def values_out(self, context: Tensor) -> Tensor:
        """context [T, H, latent] -> [T, H, value_dim]."""
        up = self._weight()[:, self.key_dim :].transpose(1, 2)
        return torch.bmm(context.transpose(0, 1), up).transpose(0, 1)

    def queries_into(self, query: Tensor, taken_in: Tensor) -> None:
        """`queries_in`, written to taken_in [T, H, latent], which may be columns of a wider tensor.

        Without a copy: torch hands a library the strides of an output whose rows are contiguous.
        """
        torch.bmm(query.transpose(0, 1), self._weight()[:, : self.key_dim], out=taken_in.transpose(0, 1))

    def values_into(self, context: Tensor, out: Tensor) -> None:
        """`values_out`, written to out [T, H, value_dim]."""
        up = self._weight()[:, self.key_dim :].transpose(1, 2)
        torch.bmm(context.transpose(0, 1), up, out=out.transpose(0, 1))

    def expand(self, latents: Tensor) -> Tensor:
        """latents [.., latent] -> [.., H, key_dim + value_dim]."""
        rows = self.rows()
        made = F.linear(latents.to(rows.dtype), rows).to(latents.dtype)
        return made.view(*latents.shape[:-1], self.heads, self.key_dim + self.value_dim)

    def split_for_gains(self, weights: LoraWeights) -> list[tuple[int, LoraWeights]]:
        """(head, weights) of an adapter's gain of kv_b_proj, before queries enter: nothing but the gain."""
        if weights.gain is None:
            return []
        nothing = LoraWeights(weights.a.new_empty(0, self.key_dim), weights.b.new_empty(self.key_dim, 0), 1.0)
        rows = enumerate(weights.gain.chunk(self.heads))
        return [(head, nothing._replace(gain=gain[: self.key_dim])) for head, gain in rows]

    def split_for_queries(self, weights: LoraWeights) -> list[tuple[int, LoraWeights]]:
        """(head, weights) of its low-rank update, where queries enter."""
        return [
            (head, LoraWeights(rows[: self.key_dim], weights.a, weights.scale))
            for head, rows in enumerate(weights.b.chunk(self.heads))
        ]

    def split_for_values(self, weights: LoraWeights) -> list[tuple[int, LoraWeights]]:
        """The same where results leave; rows keep their gains."""
        rows = [rows[self.key_dim :] for rows in weights.b.chunk(self.heads)]
        gains: list[Tensor | None] = [None] * self.heads
        if weights.gain is not None:
            gains = [gain[self.key_dim :] for gain in weights.gain.chunk(self.heads)]
        return [(head, LoraWeights(weights.a, rows[head], weights.scale, gains[head])) for head in range(self.heads)]


class LatentLayer:
    """The latents of one layer, and absorbed attention over them."""

    def __init__(self, projection: AbsorbedProjection, shape: KVShape, visible: Visible, step: CurrentStep) -> None:
        self.shape, self.projection, self.visible, self._step = shape, projection, visible, step
        self._entering_ops: list[SiteOp] = []
        self._query_ops: list[SiteOp] = []
        self._value_ops: list[SiteOp] = []

    def add_op(self, on_entering: SiteOp, on_queries: SiteOp, on_values: SiteOp) -> None:
        self._entering_ops.append(on_entering)
        self._query_ops.append(on_queries)
        self._value_ops.append(on_values)

    def allocate(self, make: MakeKV) -> None:
        self._cache = make(1, self.shape.key_dim)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        """query [T, H, key_dim + rope]; key and value: the latent [T, 1, latent] and the rotated key [T, 1, rope]."""
        inputs, it = self._step.inputs, self.projection
        clear(self._cache, inputs.fresh_blocks)
        store_latent(key[:, 0], value[:, 0], self._cache, inputs.slot_mapping)
        content, position = query.split([it.key_dim, query.shape[-1] - it.key_dim], dim=-1)
        content = _adapted(_as_it_is, content, self._entering_ops)
        taken_in = _adapted(it.queries_in, content, self._query_ops)
        absorbed = torch.cat([taken_in, position], dim=-1)
        context = paged_attention(absorbed, self._cache, self._cache[..., : it.latent], inputs.attention, scale,
                                  self.visible.window, softcap, sinks, self.visible.chunk)  # fmt: skip
        return _adapted(it.values_out, context, self._value_ops)

    def attend_in_place(
        self, query: Tensor, compressed: Tensor, norm: LatentNorm, turns: Turns, scale: float
    ) -> Tensor:
        """`attend` and what comes before it, where kernels compute.

        query [T, H, key_dim + rope] and compressed [T, latent + rope], neither rotated nor normed yet.
        """
        inputs, it = self._step.inputs, self.projection
        clear(self._cache, inputs.fresh_blocks)
        content, position = query.split([it.key_dim, query.shape[-1] - it.key_dim], dim=-1)
        absorbed = query.new_empty(*query.shape[:2], self.shape.key_dim)
        latent_prep(position, compressed, norm, turns, self._cache, inputs.slot_mapping, absorbed)
        content = _adapted(_as_it_is, content, self._entering_ops)
        begun = begin_all(self._query_ops, content)
        step = None if begun else self._expanded_step(inputs)
        if step is None:
            return self._absorbed(content, absorbed, inputs.attention, scale, begun)
        if step.absorbed is None:
            return self._expanded(content, absorbed, step, scale)
        out = query.new_empty(*query.shape[:2], it.value_dim)
        rows, others = step.expanded.rows, step.absorbed.rows
        own = content.index_select(0, rows), absorbed.index_select(0, rows)
        out.index_copy_(0, rows, self._expanded(*own, step, scale))
        rest = content.index_select(0, others), absorbed.index_select(0, others)
        out.index_copy_(0, others, self._absorbed(*rest, step.absorbed.batch, scale, begun))
        return out

    def _absorbed(
        self, content: Tensor, absorbed: Tensor, batch: AttentionBatch | DeviceBatch, scale: float,
        begun: Sequence[Finish],
    ) -> Tensor:  # fmt: skip
        """[T, H, value_dim]. content [T, H, key_dim]: of queries, whose rotated part is in `absorbed` already; begun:
        what adapters do where they enter."""
        it = self.projection
        taken_in = content.new_empty(*content.shape[:2], it.latent) if begun else absorbed[..., : it.latent]
        it.queries_into(content, taken_in)
        if begun:
            absorbed[..., : it.latent] = _finished(taken_in, begun)
        context = paged_attention(absorbed, self._cache, self._cache[..., : it.latent], batch, scale,
                                  self.visible.window, None, None, self.visible.chunk)  # fmt: skip
        begun = begin_all(self._value_ops, context)
        out = context.new_empty(*context.shape[:2], it.value_dim)
        it.values_into(context, out)
        return _finished(out, begun)

    def _expanded(self, content: Tensor, absorbed: Tensor, step: ExpandedStep, scale: float) -> Tensor:
        """The same where keys and values are made of the latents again, without adapters."""
        it = self.projection
        cached = self._cache.index_select(0, step.blocks)[:, :, 0]
        made = it.expand(cached[..., : it.latent])
        key = made.new_empty(*made.shape[:3], content.shape[-1] + cached.shape[-1] - it.latent)
        key[..., : it.key_dim] = made[..., : it.key_dim]
        key[..., it.key_dim :] = cached[:, :, None, it.latent :]
        query = torch.cat([content, absorbed[..., it.latent :]], dim=-1)
        return paged_attention(query, key, made[..., it.key_dim :], step.expanded.batch, scale)

    def _expanded_step(self, inputs: StepInputs) -> ExpandedStep | None:
        """How this step's prompts are computed with their keys and values expanded; None: not at all."""
        it, batch = self.projection, inputs.attention
        if inputs.sequences is None or not isinstance(batch, DeviceBatch) or self.visible != Visible():
            return None
        sizes = LatentSizes(it.heads, it.latent, self.shape.key_dim - it.latent, it.key_dim, it.value_dim)
        return inputs.sequences.expanded(sizes, batch, self._cache.shape[1], self._cache.element_size())


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _adapted(product: Callable[[Tensor], Tensor], x: Tensor, ops: Sequence[SiteOp]) -> Tensor:
    """The product of x [T, H, in] and what the adapters do to it, head by head."""
    begun = begin_all(ops, x)
    return _finished(product(x), begun)


def _finished(projected: Tensor, begun: Sequence[Finish]) -> Tensor:
    if begun:
        projected = projected.contiguous()
        for finish in begun:
            finish(projected.flatten(1))
    return projected


def keep_latents(attention: Foreign) -> None:
    """Make the module hand its latents to the attention function instead of expanding them."""
    attention.expand_kv = lambda latent, rotated: (latent, rotated)
