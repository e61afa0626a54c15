"""Multi-head latent attention over its latents: what DeepSeek-V2 and V3 cache is one short vector a token.

The up-projections of keys and values are moved to the other side of the attention ("absorbed"): queries are taken into
the latent space, attention runs there with one key head, and its result is taken out again. For DeepSeek-V2-Lite the
cache holds 512 + 64 numbers a token and layer instead of 16 * (192 + 128).
"""

import torch
from torch import Tensor, nn

from kernels.lora import LoraSite, LoraWeights, SiteAdapters, lora
from kernels.paged_attention import paged_attention
from kernels.store_kv import store_latent
from server.model.attention import clear, new_cache
from server.model.inputs import CurrentStep, lora_acts
from server.model.probe import KVShape


def is_latent(attention: nn.Module) -> bool:
    return hasattr(attention, "expand_kv") and hasattr(attention, "kv_b_proj")


def latent_shape(attention: nn.Module) -> KVShape:
    """What a token caches: one head of latent and rotated key, and no values beside."""
    return KVShape(1, attention.kv_lora_rank + attention.qk_rope_head_dim, 0)


class AbsorbedProjection:
    """kv_b_proj [heads * (key_dim + value_dim), latent] of one layer, as queries and results pass through it.

    LoRA on it acts on both sides, and on every head with rows of its own: two sites with a slice a head.
    """

    def __init__(self, attention: nn.Module) -> None:
        self._attention = attention
        self.heads, self.latent = attention.num_heads, attention.kv_lora_rank
        self.key_dim, self.value_dim = attention.qk_nope_head_dim, attention.v_head_dim
        # (B_h^T q) A, where a plain site has B (A x): the same two matrices, transposed and in the other order
        self.query_site = LoraSite((self.latent,) * self.heads, own_inputs=True, transposed=True)
        self.value_site = LoraSite((self.value_dim,) * self.heads, own_inputs=True)
        self.query_adapters, self.value_adapters = SiteAdapters(), SiteAdapters()

    @property
    def out_features(self) -> int:
        return self.heads * (self.key_dim + self.value_dim)

    def _weight(self) -> Tensor:
        return self._attention.kv_b_proj.weight.view(self.heads, self.key_dim + self.value_dim, self.latent)

    def queries_in(self, query: Tensor) -> Tensor:
        """query [T, H, key_dim] -> [T, H, latent]."""
        return torch.bmm(query.transpose(0, 1), self._weight()[:, : self.key_dim]).transpose(0, 1)

    def values_out(self, context: Tensor) -> Tensor:
        """context [T, H, latent] -> [T, H, value_dim]."""
        up = self._weight()[:, self.key_dim :].transpose(1, 2)
        return torch.bmm(context.transpose(0, 1), up).transpose(0, 1)

    def split_for_queries(self, weights: LoraWeights) -> list[tuple[int, LoraWeights]]:
        """(head, weights) of an adapter's low-rank update of kv_b_proj, for query_site."""
        return [
            (head, LoraWeights(rows[: self.key_dim], weights.a, weights.scale))
            for head, rows in enumerate(weights.b.chunk(self.heads))
        ]

    def split_for_values(self, weights: LoraWeights) -> list[tuple[int, LoraWeights]]:
        """The same for value_site."""
        return [
            (head, LoraWeights(weights.a, rows[self.key_dim :], weights.scale))
            for head, rows in enumerate(weights.b.chunk(self.heads))
        ]


class LatentLayer:
    """The latents of one layer, and absorbed attention over them."""

    def __init__(
        self, projection: AbsorbedProjection, shape: KVShape, num_blocks: int, block_size: int, step: CurrentStep,
        like: Tensor,
    ) -> None:  # fmt: skip
        self._cache = new_cache(like, num_blocks, block_size, 1, shape.key_dim)
        self._projection, self._step = projection, step

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        """query [T, H, key_dim + rope]; key and value: the latent [T, 1, latent] and the rotated key [T, 1, rope]."""
        inputs, it = self._step.inputs, self._projection
        clear(self._cache, inputs.fresh_blocks)
        store_latent(key[:, 0], value[:, 0], self._cache, inputs.slot_mapping)
        content, position = query.split([it.key_dim, query.shape[-1] - it.key_dim], dim=-1)
        taken_in = self._with_lora(it.queries_in(content), content, it.query_site, it.query_adapters)
        absorbed = torch.cat([taken_in, position], dim=-1)
        context = paged_attention(absorbed, self._cache, self._cache[..., : it.latent], inputs.attention, scale,
                                  None, softcap, sinks)  # fmt: skip
        return self._with_lora(it.values_out(context), context, it.value_site, it.value_adapters)

    def _with_lora(self, projected: Tensor, x: Tensor, site: LoraSite, adapters: SiteAdapters) -> Tensor:
        """projected, x [T, H, ..]: add what the adapters add, head by head."""
        rows = self._step.inputs.rows
        if lora_acts(adapters, rows):
            projected = projected.contiguous()
            lora(projected.flatten(1), x.flatten(1), site, adapters, rows.tiles, rows.shape.rank)
        return projected


def keep_latents(attention: nn.Module) -> None:
    """Make the module hand its latents to the attention function instead of expanding them."""
    attention.expand_kv = lambda latent, rotated: (latent, rotated)  # type: ignore[assignment]
