"""The two models that are measured, at their real sizes and at toy sizes."""

from typing import Any

# by name: model type, real sizes, toy sizes
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "DeepSeek-V2-Lite": (
        "deepseek_v2",
        dict(vocab_size=102400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408,
             num_hidden_layers=27, num_attention_heads=16, num_key_value_heads=16, n_shared_experts=2,
             n_routed_experts=64, routed_scaling_factor=1.0, kv_lora_rank=512, q_lora_rank=None, qk_rope_head_dim=64,
             v_head_dim=128, qk_nope_head_dim=128, topk_method="greedy", num_experts_per_tok=6,
             first_k_dense_replace=1, max_position_embeddings=8192),
        dict(vocab_size=97, hidden_size=32, intermediate_size=40, moe_intermediate_size=24, num_hidden_layers=2,
             num_attention_heads=2, num_key_value_heads=2, n_shared_experts=1, n_routed_experts=8, kv_lora_rank=24,
             q_lora_rank=None, qk_rope_head_dim=8, v_head_dim=8, qk_nope_head_dim=8, topk_method="greedy",
             num_experts_per_tok=2, first_k_dense_replace=1, max_position_embeddings=256),
    ),
    "Llama-3.1-8B": (
        "llama",
        dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
             num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192),
        dict(vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256),
    ),
}  # fmt: skip

# out, in: each product of a decode but the routed experts'
LINEARS = {
    "Llama qkv": (6144, 4096), "Llama o": (4096, 4096), "Llama gate_up": (28672, 4096), "Llama down": (4096, 14336),
    "Llama lm_head": (128256, 4096), "V2-Lite q and latent": (3648, 2048), "V2-Lite o": (2048, 2048),
    "V2-Lite shared gate_up": (5632, 2048), "V2-Lite shared down": (2048, 2816),
    "V2-Lite dense gate_up": (21888, 2048), "V2-Lite dense down": (2048, 10944), "V2-Lite lm_head": (102400, 2048),
}  # fmt: skip
TOY_LINEARS = {"toy": (48, 32)}
