"""Latent attention (MLA) without the copies that Transformers' forward makes on its way: a forward of ours around it.

What is rotated, normed and cached of a token is one launch, and both products around the attention write where the next
step reads. It takes the place of a module's own where trying that with stand-ins for its parts shows that it computes
the same, and computes where kernels do; elsewhere the module's own forward does.
"""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from kernels.compiled import takes
from kernels.latent_prep import LatentNorm, Pairing, Turns
from kernels.rope.reference import rope, rope_complex
from server.model.families import Foreign
from server.model.likeness import Says, are_alike, numbers, outcome, stand_in
from server.model.mla import LatentLayer
from server.model.norms import RmsNorm

_TRIED = "heddle_tried"  # the attention of modules that are tried
_TOKENS = 5


class LatentForm(NamedTuple):
    """What a module's forward is, beside its sizes."""

    scale: float
    pairing: Pairing


class OwnLatentAttention:
    """Takes the place of the forward of a module whose form is known."""

    def __init__(self, attention: Foreign, layer: LatentLayer, form: LatentForm) -> None:
        self.inner = attention.forward
        self._attention, self._layer, self._form = attention, layer, form

    def __call__(
        self, hidden_states: Tensor, position_embeddings: Any = None, **others: object
    ) -> tuple[Tensor, Tensor | None]:
        if not takes(hidden_states):
            result: tuple[Tensor, Tensor | None] = self.inner(
                hidden_states=hidden_states, position_embeddings=position_embeddings, **others
            )
            return result
        it = self._attention
        if it.q_lora_rank is None:
            query = it.q_proj(hidden_states)
        else:
            query = it.q_b_proj(it.q_a_layernorm(it.q_a_proj(hidden_states)))
        compressed = it.kv_a_proj_with_mqa(hidden_states)
        norm = LatentNorm(it.kv_a_layernorm.weight, *it.kv_a_layernorm.kind)
        turns = _turns(position_embeddings, self._form.pairing)
        heads = query[0].unflatten(-1, (it.num_heads, -1))
        attended = self._layer.attend_in_place(heads, compressed[0], norm, turns, self._form.scale)
        return it.o_proj(attended.flatten(1)[None]), None


def _turns(embeddings: Any, pairing: Pairing) -> Turns:
    """Of what a model hands its layers: complex numbers [1, T, R / 2], or cosines and sines [1, T, R]."""
    if pairing == Pairing.ADJACENT:
        cos, sin = torch.view_as_real(embeddings[0]).unbind(-1)
    else:
        cos, sin = embeddings[0][0], embeddings[1][0]
    return Turns(cos, sin, pairing)


@torch.inference_mode()
def form_of(attention: Foreign) -> LatentForm | None:
    """None: its forward is another one, or has more to it than ours."""
    if not isinstance(attention.kv_a_layernorm, RmsNorm) or hasattr(attention, "indexer"):
        return None
    angles = numbers(1, _TOKENS, attention.qk_rope_head_dim // 2)
    wide = torch.cat([angles, angles], -1)
    for embeddings, pairings in (
        ((wide.cos(), wide.sin()), (Pairing.HALVES, Pairing.INTERLEAVED)),
        (torch.polar(torch.ones_like(angles), angles), (Pairing.ADJACENT,)),
    ):
        trial = _Trial(attention)
        if trial.run(embeddings):
            for pairing in pairings:
                if trial.is_like(_turns(embeddings, pairing)):
                    return LatentForm(trial.scale, pairing)
    return None


class _Trial:
    """One run of a module's own forward, with numbers in the place of what its parts compute."""

    def __init__(self, attention: Foreign) -> None:
        it = attention
        self._attention, self.scale = attention, 0.0
        self._x = numbers(1, _TOKENS, 3)
        self._query = numbers(1, _TOKENS, it.num_heads * (it.qk_nope_head_dim + it.qk_rope_head_dim), seed=1)
        self._compressed = numbers(1, _TOKENS, it.kv_lora_rank + it.qk_rope_head_dim, seed=2)
        self._attended = numbers(1, _TOKENS, it.num_heads, it.v_head_dim, seed=3)
        self._seen: list[tuple[Tensor, Tensor, Tensor, Mapping[str, Any]]] = []

    def run(self, embeddings: object) -> bool:
        """Whether it can be called like this, asks for attention once, and does no more with what it gets."""
        config = copy.copy(self._attention.config)
        config._attn_implementation = _TRIED
        tried = stand_in(self._attention, self._parts(), config=config, tried=self._attend)
        theirs = outcome(lambda: type(self._attention).forward(
            tried, hidden_states=self._x, position_embeddings=embeddings, attention_mask=None,
            position_ids=torch.arange(_TOKENS)[None] + 40, past_key_values=None))  # fmt: skip
        if len(self._seen) != 1 or not isinstance(theirs, tuple) or len(theirs) != 2:
            return False
        return are_alike(theirs[0], self._attended.flatten(2) / 2)

    def _parts(self) -> dict[str, nn.Module]:
        """Each says something of its own, if it is given what it should be."""

        def reads(given: Tensor, says: Tensor) -> Says:
            return Says(lambda it: says if it is given else None)

        parts: dict[str, nn.Module] = {
            "kv_a_proj_with_mqa": reads(self._x, self._compressed),
            "kv_a_layernorm": Says(_stand_in_norm),
            "o_proj": Says(lambda it: it / 2),
        }
        if self._attention.q_lora_rank is None:
            return {**parts, "q_proj": reads(self._x, self._query)}
        narrow, normed = numbers(1, _TOKENS, 2, seed=4), numbers(1, _TOKENS, 2, seed=5)
        return {**parts, "q_a_proj": reads(self._x, narrow), "q_a_layernorm": reads(narrow, normed),
                "q_b_proj": reads(normed, self._query)}  # fmt: skip

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        self._seen.append((query, key, value, arguments))
        return self._attended

    def is_like(self, turns: Turns) -> bool:
        """Whether attention was asked for as ours asks: with queries, latents and keys normed and rotated like this."""
        ((query, latent, key, arguments),) = self._seen
        it = self._attention
        heads = self._query.unflatten(-1, (it.num_heads, -1)).transpose(1, 2)
        content, rotary = heads.split([it.qk_nope_head_dim, it.qk_rope_head_dim], -1)
        narrow, shared = self._compressed[:, None].split([it.kv_lora_rank, it.qk_rope_head_dim], -1)
        if turns.pairing == Pairing.ADJACENT:
            rotated = rope_complex(rotary.contiguous(), shared.contiguous(), torch.stack([*turns[:2]], -1)[None])
        else:
            rotated = rope(rotary, shared, turns.cos[None], turns.sin[None], turns.pairing == Pairing.INTERLEAVED)
        ours = torch.cat([content, rotated[0]], -1), _stand_in_norm(narrow), rotated[1]
        scale = arguments.get("scaling")
        self.scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
        is_plain = arguments.get("softcap") is None and arguments.get("s_aux") is None
        return is_plain and are_alike((query, latent, key), ours)


def _stand_in_norm(latent: Tensor) -> Tensor:
    return latent**3


def _hand_over(module: Foreign, query: Tensor, key: Tensor, value: Tensor, attention_mask: object = None,
               **arguments: Any) -> tuple[Tensor, None]:  # fmt: skip
    return module.tried(query, key, value, arguments), None


AttentionInterface.register(_TRIED, _hand_over)
