"""ESFT: whole experts, as its trainer and the hub's checkpoints hold them, and what goes wrong with them."""

from tests.census import esft_makers as makers
from tests.census.esft_makers import esft
from tests.census.families import DEEPSEEK, MIXTURES
from tests.census.made import Row, Section

SHARED = (*DEEPSEEK,)
AND_DENSE = ("llama", *MIXTURES)

ESFT = Section("esft", "ESFT", [
    Row("as the trainer writes it, with expert_cfg.json", esft(), AND_DENSE),
    Row("hub v1 keys (no model. prefix)", esft(makers.without_prefix), MIXTURES),
    Row("without expert_cfg.json", esft(makers.without_config), MIXTURES),
    Row("single model.safetensors, no index", esft(makers.single_file), MIXTURES),
    Row("two shards", esft(makers.two_shards), MIXTURES),
    Row("with the hub's copied model files", esft(makers.with_model_files), MIXTURES),
    Row("bfloat16", esft(makers.in_bfloat16), MIXTURES),
    Row("Qwen's names on Mixtral", esft(makers.under_mlp), ("mixtral",)),
    Row("expert-parallel: one rank's directory, no expert_cfg.json", esft(makers.one_rank, sound=False), MIXTURES),
    Row("expert-parallel: one rank's directory, full expert_cfg.json",
        esft(makers.one_rank_with_config, sound=False), MIXTURES),
    Row("expert-parallel: parent of all ranks' directories", makers.parent_of_ranks, MIXTURES),
    Row("expert-parallel: all ranks' files in one directory", esft(makers.ranks_together), MIXTURES),
    Row("with shared experts, flag true", esft(makers.with_shared(flag=True)), SHARED),
    Row("with shared experts, flag false", esft(makers.with_shared(flag=False)), SHARED),
    Row("with shared experts, no expert_cfg.json", esft(makers.with_shared(flag=None)), SHARED),
    Row("shared_experts true, none in the file", esft(makers.flagged("shared_experts"), sound=False), MIXTURES),
    Row("with non-expert modules, flag true", esft(makers.with_norms(flag=True)), MIXTURES),
    Row("with non-expert modules, flag false", esft(makers.with_norms(flag=False)), MIXTURES),
    Row("with the router, no expert_cfg.json", esft(makers.with_router), MIXTURES),
    Row("one matrix of an expert missing", esft(makers.one_missing, sound=False), MIXTURES),
    Row("an expert that expert_cfg.json does not list", esft(makers.unlisted, sound=False), MIXTURES),
    Row("an expert that the base does not have", esft(makers.beyond, sound=False), MIXTURES),
    Row("packed gate_up keys", esft(makers.packed), MIXTURES),
    Row("all experts of a layer in one tensor", esft(makers.stacked), MIXTURES),
    Row("esft-qwen-patch-v1 (packed slices)", makers.patch, MIXTURES),
    Row("a layer with an empty list", esft(makers.empty_layer), MIXTURES),
    Row("extra key in expert_cfg.json", esft(makers.extra_key), MIXTURES),
    Row("pytorch_model.bin", esft(makers.as_pickle), MIXTURES),
])  # fmt: skip
