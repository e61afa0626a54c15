"""Configurations of tiny models, at least one for every served family, with the family's own features switched on.

Windows of 7 tokens, prompts of up to 33; heads of another size than hidden size / heads where a family allows it;
multipliers, soft caps and scales other than one.
"""

from typing import Any

VOCAB = 199

BASE = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    tie_word_embeddings=False,
)  # fmt: skip
_MOE = dict(moe_intermediate_size=48, num_experts_per_tok=2)
_MLA = dict(
    q_lora_rank=None, kv_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=12, num_key_value_heads=4,
    first_k_dense_replace=1, n_shared_experts=2, n_routed_experts=8,
)  # fmt: skip
_MLA_MOE = {**_MLA, **_MOE, "q_lora_rank": 20, "n_group": 4, "topk_group": 2}
_DENSE_FIRST = dict(mlp_layer_types=["dense", "sparse", "sparse", "sparse"])
_MIXED = dict(sliding_window=7, layer_types=["sliding_attention", "full_attention"] * 2)
_SLIDING = dict(sliding_window=7, layer_types=["sliding_attention"] * 4)


def _rope(rope_type: str = "default", **parameters: Any) -> dict[str, Any]:
    return {"rope_type": rope_type, "rope_theta": 1e4, **parameters}


_TWO_ROPES = dict(rope_parameters={
    "sliding_attention": _rope(), "full_attention": _rope("linear", factor=8.0, rope_theta=1e6)})  # fmt: skip
_PARTIAL = dict(rope_parameters=_rope(partial_rotary_factor=0.5))
_GEMMA = dict(head_dim=24, query_pre_attn_scalar=24, **_MIXED)
_GEMMA4 = dict(head_dim=16, global_head_dim=24, num_global_key_value_heads=1, final_logit_softcapping=3.0,
               **_MIXED, rope_parameters={"sliding_attention": _rope(), "full_attention": _rope(
                   "proportional", partial_rotary_factor=0.5, rope_theta=1e6)})  # fmt: skip
_PER_LAYER = dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB)
_GRANITE = dict(embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.7, attention_multiplier=0.3)

# name -> (model type, what differs from BASE)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", dict(tie_word_embeddings=True)),
    "llama-rope3": ("llama", dict(rope_parameters=_rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32))),
    "llama-yarn": ("llama", dict(rope_parameters=_rope("yarn", factor=4.0, original_max_position_embeddings=32))),
    "llama-dynamic": ("llama", dict(rope_parameters=_rope("dynamic", factor=4.0), max_position_embeddings=64)),
    "mistral-window": ("mistral", dict(sliding_window=7)),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", dict(use_sliding_window=True, sliding_window=7, max_window_layers=2)),
    "qwen3": ("qwen3", dict(head_dim=24)),
    "gemma2": ("gemma2", dict(sliding_window=7, head_dim=24, query_pre_attn_scalar=24, attn_logit_softcapping=5.0,
                              final_logit_softcapping=3.0)),
    "phi3": ("phi3", dict(sliding_window=7)),
    "phi3-partial": ("phi3", dict(sliding_window=None, rope_parameters=_rope(partial_rotary_factor=0.75))),
    "phi3-longrope": ("phi3", dict(sliding_window=None, max_position_embeddings=128,
                                   original_max_position_embeddings=64, rope_parameters=_rope(
        "longrope", original_max_position_embeddings=64, short_factor=[1.0] * 8, long_factor=[4.0] * 8))),
    "olmoe": ("olmoe", dict(num_experts=8, num_experts_per_tok=2)),
    "mixtral-window": ("mixtral", dict(num_local_experts=8, num_experts_per_tok=2, sliding_window=7)),
    "qwen2_moe": ("qwen2_moe", dict(num_experts=8, shared_expert_intermediate_size=40, **_MOE)),
    "qwen2_moe-window": ("qwen2_moe", dict(num_experts=8, shared_expert_intermediate_size=40, use_sliding_window=True,
                                           sliding_window=7, max_window_layers=2, **_MOE)),
    "qwen3_moe": ("qwen3_moe", dict(num_experts=8, head_dim=24, **_MOE)),
    "deepseek_v2": ("deepseek_v2", dict(topk_method="greedy", **_MLA, **_MOE)),
    "deepseek_v2-grouped": ("deepseek_v2", dict(
        topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=16.0, rope_parameters=_rope(
            "yarn", factor=40, beta_fast=32, beta_slow=1, mscale=0.707, mscale_all_dim=0.707,
            original_max_position_embeddings=64), **{**_MLA, "q_lora_rank": 20}, **_MOE)),
    "deepseek_v3": ("deepseek_v3", dict(n_group=4, topk_group=2, **{**_MLA, "q_lora_rank": 20}, **_MOE)),
    "deepseek_v32": ("deepseek_v32", dict(index_topk=43, index_n_heads=2, index_head_dim=16, **_MLA_MOE)),
    "glm_moe_dsa": ("glm_moe_dsa", dict(
        index_topk=43, index_n_heads=2, index_head_dim=16, indexer_types=["full", "shared"] * 2, **_MLA_MOE)),
    "axk2": ("axk2", dict(
        index_topk=43, index_n_heads=2, index_head_dim=16, gated_norm_rank=4, head_dim=8, **{
            **_MLA_MOE, **_DENSE_FIRST})),
    "mistral4": ("mistral4", dict(
        rope_parameters=_rope("yarn", factor=4.0, original_max_position_embeddings=16, llama_4_scaling_beta=0.1),
        **_MLA_MOE)),
    "gpt_oss": ("gpt_oss", dict(num_local_experts=8, num_experts_per_tok=2, head_dim=24, sliding_window=7)),
    "llama4_text": ("llama4_text", dict(
        num_local_experts=8, num_experts_per_tok=1, intermediate_size_mlp=80, intermediate_size=48, head_dim=24,
        moe_layers=[1, 2, 3], no_rope_layers=[1, 0, 1, 0], attention_chunk_size=7, floor_scale=5, attn_scale=0.6)),
    "dbrx": ("dbrx", dict(
        d_model=64, attn_config=dict(kv_n_heads=2, clip_qkv=2.0, rope_theta=1e4), ffn_config=dict(
            hidden_size=64, ffn_hidden_size=48, moe_num_experts=8, moe_top_k=2, moe_normalize_expert_weights=1.0))),
    # -- dense ---
    "gemma": ("gemma", dict(head_dim=24)),
    "gemma3_text": ("gemma3_text", dict(**_GEMMA, **_TWO_ROPES)),
    "gemma3n_text": ("gemma3n_text", dict(
        head_dim=24, num_kv_shared_layers=2, laurel_rank=8, altup_num_inputs=2,
        activation_sparsity_pattern=[0.95, 0.0, 0.0, 0.0], final_logit_softcapping=3.0, **_MIXED, **_PER_LAYER)),
    "gemma4_text": ("gemma4_text", dict(num_kv_shared_layers=2, use_double_wide_mlp=True, **_GEMMA4, **_PER_LAYER)),
    "gemma4_text-plain": ("gemma4_text", dict(hidden_size_per_layer_input=0, **_GEMMA4)),
    "gemma4_text-keys-as-values": ("gemma4_text", dict(
        hidden_size_per_layer_input=0, attention_k_eq_v=True, **_GEMMA4)),
    "gemma4_unified_text": ("gemma4_unified_text", dict(hidden_size_per_layer_input=0, **_GEMMA4)),
    "vaultgemma": ("vaultgemma", dict(attn_logit_softcapping=5.0, final_logit_softcapping=3.0, **_GEMMA)),
    "granite": ("granite", dict(**_GRANITE)),
    "granite_swa": ("granite_swa", dict(**_GRANITE, **_MIXED)),
    "granitemoehybrid": ("granitemoehybrid", dict(
        num_local_experts=0, shared_intermediate_size=96, layer_types=["attention"] * 4, position_embedding_type="rope",
        **_GRANITE)),
    "olmo": ("olmo", dict(clip_qkv=2.0)),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", dict(_MIXED)),
    "olmo3-yarn": ("olmo3", dict(
        rope_parameters=_rope("yarn", factor=4.0, original_max_position_embeddings=32), **_MIXED)),
    "smollm3": ("smollm3", dict(no_rope_layers=[1, 1, 1, 0])),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", dict(head_dim=24)),
    "seed_oss": ("seed_oss", dict(head_dim=24, attention_bias=True)),
    "exaone4": ("exaone4", dict(head_dim=16, **_MIXED)),
    "phi": ("phi", dict(num_hidden_layers=3, qk_layernorm=True, **_PARTIAL)),
    "ministral": ("ministral", dict(head_dim=24, **_MIXED)),
    "ministral3": ("ministral3", dict(head_dim=24, rope_parameters=_rope(
        "yarn", factor=4.0, original_max_position_embeddings=16, llama_4_scaling_beta=0.1))),
    "starcoder2": ("starcoder2", dict(sliding_window=7, use_bias=True)),
    "stablelm": ("stablelm", dict(qk_layernorm=True, use_qkv_bias=True, **_PARTIAL)),
    "gpt2": ("gpt2", dict(n_positions=512)),
    "gpt_bigcode": ("gpt_bigcode", dict(multi_query=True)),
    "gpt_neox": ("gpt_neox", dict(_PARTIAL)),
    "opt": ("opt", dict(ffn_dim=96, word_embed_proj_dim=64)),
    "apertus": ("apertus", {}),
    "arcee": ("arcee", {}),
    "bitnet": ("bitnet", {}),
    "hyperclovax": ("hyperclovax", dict(**_GRANITE, use_post_norm=True)),
    "jais2": ("jais2", {}),
    "minicpm3": ("minicpm3", dict(
        kv_lora_rank=24, q_lora_rank=20, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=12, num_key_value_heads=4,
        scale_emb=3.0, scale_depth=1.4, dim_model_base=32)),
    "cwm": ("cwm", dict(head_dim=16, **_MIXED)),
    "youtu": ("youtu", dict(
        kv_lora_rank=24, q_lora_rank=20, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=12,
        num_key_value_heads=4)),
    "persimmon": ("persimmon", dict(num_key_value_heads=4, **_PARTIAL)),
    "glm": ("glm", dict(head_dim=16, **_PARTIAL)),
    "glm4": ("glm4", dict(head_dim=16, **_PARTIAL)),
    "cohere": ("cohere", dict(use_qk_norm=True, logit_scale=0.7)),
    "cohere2": ("cohere2", dict(logit_scale=0.7, **_MIXED)),
    "ernie4_5": ("ernie4_5", dict(head_dim=24, use_bias=True)),
    "nemotron": ("nemotron", dict(_PARTIAL)),
    "helium": ("helium", dict(head_dim=16)),
    "nanochat": ("nanochat", dict(final_logit_softcapping=3.0)),
    "iquestcoder": ("iquestcoder", {}),
    "internlm3": ("internlm3", dict(head_dim=24, attention_bias=True, mlp_bias=True)),
    # -- mixtures ---
    "gemma4_text-moe": ("gemma4_text", dict(
        hidden_size_per_layer_input=0, enable_moe_block=True, num_experts=8, top_k_experts=2, moe_intermediate_size=48,
        **_GEMMA4)),
    "granitemoe": ("granitemoe", dict(num_local_experts=8, num_experts_per_tok=2, **_GRANITE)),
    "granitemoeshared": ("granitemoeshared", dict(
        num_local_experts=8, num_experts_per_tok=2, shared_intermediate_size=40, **_GRANITE)),
    "granitemoe_swa": ("granitemoe_swa", dict(num_local_experts=8, num_experts_per_tok=2, **_GRANITE, **_MIXED)),
    "granitemoehybrid-moe": ("granitemoehybrid", dict(
        num_local_experts=8, num_experts_per_tok=2, shared_intermediate_size=40, layer_types=["attention"] * 4,
        position_embedding_type="rope", **_GRANITE)),
    "flex_olmo": ("flex_olmo", dict(num_experts=8, num_experts_per_tok=2)),
    "glm4_moe": ("glm4_moe", dict(
        n_routed_experts=8, n_shared_experts=1, n_group=4, topk_group=2, first_k_dense_replace=1, head_dim=16,
        routed_scaling_factor=2.5, use_qk_norm=True, **_MOE, **_PARTIAL)),
    "glm4_moe_lite": ("glm4_moe_lite", {**_MLA_MOE, **_DENSE_FIRST}),
    "minimax_m2": ("minimax_m2", dict(
        num_local_experts=8, num_experts_per_tok=2, head_dim=16, use_qk_norm=True, **_PARTIAL)),
    "ernie4_5_moe": ("ernie4_5_moe", dict(
        moe_num_experts=8, moe_k=2, moe_intermediate_size=48, moe_num_shared_experts=1, moe_layer_start_index=1)),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", dict(num_experts=8, moe_topk=2, head_dim=24)),
    "hy_v3": ("hy_v3", dict(num_experts=8, head_dim=16, **_MOE, **_DENSE_FIRST)),
    "exaone_moe": ("exaone_moe", dict(
        num_experts=8, num_shared_experts=1, n_group=4, topk_group=2, head_dim=16, **_MOE, **_DENSE_FIRST, **_MIXED)),
    "dots1": ("dots1", dict(
        n_routed_experts=8, n_shared_experts=1, first_k_dense_replace=1, n_group=4, topk_group=2, norm_topk_prob=True,
        routed_scaling_factor=2.5, head_dim=16, **_MOE, **_MIXED)),
    "dots1-full": ("dots1", dict(
        n_routed_experts=8, n_shared_experts=1, first_k_dense_replace=1, norm_topk_prob=True, head_dim=16,
        layer_types=["full_attention"] * 4, sliding_window=None, **_MOE)),
    "afmoe": ("afmoe", dict(
        num_experts=8, num_shared_experts=1, num_dense_layers=1, route_scale=2.5, head_dim=16, mup_enabled=True,
        global_attn_every_n_layers=2, **_MOE, **_MIXED)),
    "solar_open": ("solar_open", dict(
        n_routed_experts=8, n_shared_experts=1, n_group=4, topk_group=2, routed_scaling_factor=2.5, head_dim=16,
        **_MOE)),
    "mimo_v2_flash": ("mimo_v2_flash", dict(
        n_routed_experts=8, n_group=4, topk_group=2, head_dim=24, v_head_dim=16, **_MOE, **_DENSE_FIRST, **_MIXED)),
    "mellum": ("mellum", dict(num_experts=8, head_dim=16, **_MOE, **_MIXED, **_TWO_ROPES)),
    "laguna": ("laguna", dict(
        num_experts=8, shared_expert_intermediate_size=40, head_dim=16, moe_routed_scaling_factor=1.7,
        num_attention_heads_per_layer=[4, 4, 4, 4], **_MOE, **_DENSE_FIRST, **_MIXED)),
    "laguna-capped": ("laguna", dict(
        num_experts=8, shared_expert_intermediate_size=40, head_dim=16, moe_router_logit_softcapping=2.0,
        num_attention_heads_per_layer=[4, 4, 4, 4], **_MOE, **_DENSE_FIRST, **_MIXED)),
    "axk1": ("axk1", {**_MLA_MOE, **_DENSE_FIRST}),
    "cohere2_moe": ("cohere2_moe", dict(
        num_experts=8, num_experts_per_tok=2, num_shared_experts=1, head_dim=16, logit_scale=0.7, **_MIXED,
        **_DENSE_FIRST)),
    "cohere2_moe-sigmoid": ("cohere2_moe", dict(
        num_experts=8, num_experts_per_tok=2, expert_selection_fn="sigmoid", head_dim=16, logit_scale=0.7, **_MIXED,
        **_DENSE_FIRST)),
    "flint": ("flint", dict(
        num_experts=8, head_dim=24, shared_expert_intermediate_size=40, mlp_only_layers=[0], norm_topk_prob=True,
        **_MOE, **_MIXED)),
    "kolibri1": ("kolibri1", dict(
        num_experts=8, head_dim=24, shared_expert_intermediate_size=40, **_MOE, **_MIXED)),
    "phimoe": ("phimoe", dict(num_local_experts=8, num_experts_per_tok=2, router_jitter_noise=0.3)),
}  # fmt: skip
