"""The models of the sections beside those of the comparison with peers, made from seeds."""

from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DeepseekV2Config

from benchmarks.adapters.layouts import Counts, Shape, adapters
from benchmarks.peers.models import CONTEXT, Models, enliven, esft, llama, mixture
from benchmarks.workload import write_tokenizer

MANY = 20  # ESFT adapters of a DeepSeek
VOCAB = 8192
_ROPE = 16  # elements of a key that are rotated


class AdapterModels(Models):
    MAKERS: ClassVar = {
        **Models.MAKERS,
        "deepseek-32": lambda directory: deepseek(directory, Shape(32, 4)),
        "deepseek-8": lambda directory: deepseek(directory, Shape(8, 4)),
        "llama-32": lambda directory: llama(directory, 32),
        "mixture-12": lambda directory: mixture(directory, 12),
        "mixture-64": lambda directory: mixture(directory, 64),
    }


def deepseek(directory: Path, shape: Shape) -> None:
    """A DeepSeek-V2-Lite of this width, with MANY adapters `esft-i` that tune as many experts as real ones do."""
    torch.manual_seed(0)
    scale = shape.scale
    config = DeepseekV2Config(
        hidden_size=shape.hidden, moe_intermediate_size=shape.inner, intermediate_size=10944 // scale,
        num_hidden_layers=1 + shape.moe_layers, first_k_dense_replace=1, n_routed_experts=shape.experts,
        num_experts_per_tok=6, n_shared_experts=2, topk_method="greedy", num_attention_heads=4, num_key_value_heads=4,
        q_lora_rank=None, kv_lora_rank=512 // scale, qk_rope_head_dim=_ROPE, qk_nope_head_dim=32, v_head_dim=32,
        vocab_size=VOCAB, max_position_embeddings=CONTEXT, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory / "base")
    write_tokenizer(directory / "base", VOCAB)
    enliven(directory / "base")
    weights = load_file(directory / "base" / "model.safetensors")
    for index, counts in enumerate(adapters(MANY, shape.moe_layers)):
        generator = torch.Generator().manual_seed(index)
        esft(directory / "adapters" / f"esft-{index}", weights, _tuned(counts, shape, generator), generator)


def kv_bytes(shape: Shape) -> int:
    """Of a token, in all layers: its latent and its rotated key."""
    return (1 + shape.moe_layers) * (512 // shape.scale + _ROPE) * shape.itemsize


def _tuned(counts: Counts, shape: Shape, generator: torch.Generator) -> dict[int, list[int]]:
    return {layer: sorted(torch.randperm(shape.experts, generator=generator)[:count].tolist())
            for layer, count in enumerate(counts, 1)}  # fmt: skip
