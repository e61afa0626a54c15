"""What PEFT's LoraConfig offers."""

import peft
import torch

from tests.census import peft_flows
from tests.census.by_peft import cast, lora
from tests.census.families import EVERY, MIXTURES, TEN, Family
from tests.census.made import Maker, Row, Section
from tests.support.engine_harness import prompts

SMALL = {"save_embedding_layers": False}


def attention(family: Family) -> list[str]:
    return list(family.attention)


def mlp(family: Family) -> list[str]:
    return list(family.mlp)


def attention_and_mlp(family: Family) -> list[str]:
    return [*family.attention, *family.mlp]


def attention_and_head(family: Family) -> list[str]:
    return [*family.attention, "lm_head"]


def router(family: Family) -> list[str]:
    return [str(family.router)]


def _patterns_of_all_kinds() -> Maker:
    return lora(
        rank_pattern={r"layers\.[01]\.self_attn\.o_proj": 2, "o_proj": 6},
        alpha_pattern={"model.layers.2.self_attn.o_proj": 3, r".*\.o_proj": 20},
    )


_TARGETS = [
    Row("attention only", lora(), EVERY),
    Row("all-linear", lora(target_modules="all-linear"), EVERY),
    Row("mlp names (v4 names)", lora(target_modules=mlp), EVERY),
    Row("attention + mlp names", lora(target_modules=attention_and_mlp), EVERY),
    Row("regex target_modules", lora(target_modules=r".*\.self_attn\.\w*(proj|mqa)"), TEN),
    Row("no task_type", lora(task_type=None), TEN),
    Row("task_type FEATURE_EXTRACTION", lora(task_type="FEATURE_EXTRACTION"), TEN),
    Row("target_parameters on a linear's weight", lora(target_parameters=["o_proj.weight"], target_modules=[]), TEN),
    Row("target_parameters + alpha_pattern by module name",
        lora(target_parameters=["o_proj.weight"], target_modules=[], alpha_pattern={"o_proj": 24}), TEN),
    Row("target_parameters + alpha_pattern by parameter name",
        lora(target_parameters=["o_proj.weight"], target_modules=[], alpha_pattern={"o_proj.weight": 24}), TEN),
    Row("layers_to_transform", lora(layers_to_transform=[1, 2]), TEN),
    Row("layers_to_transform + layers_pattern", lora(layers_to_transform=[1, 2], layers_pattern="layers"), TEN),
    Row("exclude_modules: a target", lora(exclude_modules=["o_proj"]), TEN),
    Row("exclude_modules: a layer", lora(exclude_modules=r".*\.layers\.1\..*"), TEN),
    Row("layer_replication", lora(layer_replication=[[0, 3], [1, 4]]), TEN),
]  # fmt: skip
_HEADS = [
    Row("embed_tokens", lora(target_modules=["embed_tokens"]), TEN),
    Row("attention + embed_tokens", lora(target_modules=lambda it: [*it.attention, "embed_tokens"]), TEN),
    Row("lm_head (default save)", lora(target_modules=["lm_head"]), TEN),
    Row("lm_head (save_embedding_layers=False)", lora(SMALL, target_modules=["lm_head"]), TEN),
    Row("attention + lm_head (default save)", lora(target_modules=attention_and_head), TEN),
    Row("embed_tokens + lm_head", lora(target_modules=["embed_tokens", "lm_head"]), TEN),
    Row("lm_head + ensure_weight_tying (False save)",
        lora(SMALL, target_modules=["lm_head"], ensure_weight_tying=True), TEN),
    Row("attention + lm_head + ensure_weight_tying (False save)",
        lora(SMALL, target_modules=attention_and_head, ensure_weight_tying=True), TEN),
    Row("embed_tokens + lm_head + ensure_weight_tying",
        lora(target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True), TEN),
    Row("modules_to_save lm_head", lora(modules_to_save=["lm_head"]), TEN),
    Row("modules_to_save embed_tokens + lm_head", lora(modules_to_save=["embed_tokens", "lm_head"]), TEN),
    Row("modules_to_save norms", lora(modules_to_save=["input_layernorm", "post_attention_layernorm"]), TEN),
    Row("modules_to_save router", lora(modules_to_save=router), MIXTURES),
    Row("trainable_token_indices", lora(trainable_token_indices=[5, 6, 7, 50, 100]), TEN),
    Row("resized embeddings (3 tokens added)", peft_flows.resized, TEN),
    Row("SEQ_CLS head", peft_flows.with_a_classifier, TEN),
]  # fmt: skip
_SCALES = [
    Row("use_rslora", lora(use_rslora=True), EVERY),
    Row("rank_pattern", lora(rank_pattern={"o_proj": 2}), TEN),
    Row("alpha_pattern", lora(alpha_pattern={"o_proj": 24}), TEN),
    Row("rank + alpha pattern + rslora",
        lora(rank_pattern={"o_proj": 2}, alpha_pattern={"o_proj": 24}, use_rslora=True), TEN),
    Row("patterns: regex, full names, order", _patterns_of_all_kinds(), TEN),
    Row("bias all", lora(bias="all"), EVERY),
    Row("bias lora_only", lora(bias="lora_only"), EVERY),
    Row("lora_bias", lora(lora_bias=True), EVERY),
    Row("fan_in_fan_out=True", lora(fan_in_fan_out=True), TEN),
    Row("lora_dropout 0.1", lora(lora_dropout=0.1), TEN),
    Row("saved in bfloat16", cast(torch.bfloat16), TEN),
    Row("saved in float16", cast(torch.float16), TEN),
    Row("runtime_config ephemeral",
        lora(runtime_config=peft.LoraRuntimeConfig(ephemeral_gpu_offload=True)), TEN),
]  # fmt: skip
_INITS = [
    *(Row(f"init {init}, saved as is", lora(init_lora_weights=init), TEN)
      for init in ("gaussian", False, "orthogonal", "mica", "pissa", "pissa_niter_4", "olora")),
    Row("init loftq, saved as is", lora(init_lora_weights="loftq", loftq_config=peft.LoftQConfig(loftq_bits=4)), TEN),
    Row("init pissa, converted", peft_flows.converted("pissa"), TEN),
    Row("init pissa, converted, rank_pattern", peft_flows.converted("pissa", rank_pattern={"o_proj": 2}), TEN),
    Row("init olora, converted", peft_flows.converted("olora"), TEN),
    Row("init olora, converted, rank_pattern", peft_flows.converted("olora", rank_pattern={"o_proj": 2}), TEN),
    Row("init pissa, converted, rslora", peft_flows.converted("pissa", use_rslora=True), TEN),
    Row("init pissa, residual base served with it", peft_flows.on_its_residual_base, TEN),
    Row("init eva", peft_flows.eva, TEN),
    Row("init corda, saved as is", peft_flows.corda, TEN),
]  # fmt: skip
_VARIANTS = [
    Row("aLoRA", lora(alora_invocation_tokens=prompts()[1][5:6]), TEN),
    Row("QALoRA flag", lora(use_qalora=True, qalora_group_size=4), TEN),
    Row("VeLoRA", lora(velora_config=peft.VeloraConfig(num_groups=4)), TEN),
    Row("BD-LoRA", lora(use_bdlora=peft.BdLoraConfig(target_modules_bd_a=["o_proj"], nblocks=2, match_strict=False)),
        TEN),
    Row("KaSA", lora(kasa_config=peft.KasaConfig()), TEN),
    Row("MonteCLoRA", lora(monteclora_config=peft.MontecloraConfig()), TEN),
    Row("arrow config", peft_flows.arrow, TEN),
    Row("LoRA-FA (A frozen)", peft_flows.only_b_trained, TEN),
    Row("two adapters in one directory", peft_flows.two_in_one_directory, TEN),
    Row("add_weighted_adapter cat", peft_flows.weighted("cat"), TEN),
    Row("add_weighted_adapter linear", peft_flows.weighted("linear"), TEN),
    Row("add_weighted_adapter svd", peft_flows.weighted("svd", svd_rank=5), TEN),
]  # fmt: skip
LORA = Section("lora", "What PEFT's LoraConfig offers", [*_TARGETS, *_HEADS, *_SCALES, *_INITS, *_VARIANTS])
