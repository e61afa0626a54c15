"""Any tensors under any names: every one is bound, or the adapter is refused in words that were foreseen."""

import json
import os
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters_store.base_spec import BaseSpec, ExpertStack
from adapters_store.errors import MAX_MESSAGE_BYTES
from adapters_store.verify import Job, Verified, answer
from tests.support.adapter_files import save_peft

M, H, I = 2, 4, 3  # noqa: E741
LAYER = "model.layers.0"
BASES = [
    BaseSpec("mixture", {f"{LAYER}.self_attn.{name}_proj": (H, H) for name in "qkv"} | {f"{LAYER}.mlp.gate": (M, H)},
             {0: ExpertStack(M, H, I, f"{LAYER}.mlp.experts")}),
    BaseSpec("gpt_oss", {f"{LAYER}.self_attn.qkv_proj": (3 * H, H)},
             {0: ExpertStack(M, H, I, f"{LAYER}.mlp.experts", True, True, True)}),
]  # fmt: skip
MODULES = st.builds(
    "{}{}{}".format,
    st.sampled_from(["model.layers.0.", "model.language_model.layers.0.", "layers.0.", "_orig_mod.model.layers.0."]),
    st.sampled_from(
        ["self_attn.", "attn.", "mlp.", "block_sparse_moe.", "mlp.experts.", "mlp.experts.0.", "mlp.experts.1."]
    ),
    st.sampled_from(
        ["q_proj", "k_proj", "qkv_proj", "gate", "experts", "w1", "w3", "gate_proj", "down_proj", "base_layer"]
    ),
)
ENDINGS = st.sampled_from(["lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "lora_A.x.weight", "bias"])
SIZES = st.sampled_from([1, M, 2 * M, H, I, 2 * I, 3 * H])
ANY = st.dictionaries(st.builds("{}.{}".format, MODULES, ENDINGS), st.lists(SIZES, min_size=1, max_size=3), max_size=6)


# (out, in) of what fits the first base, by name; a file has them under one of the prefixes
FITTING = {
    **{f"{parent}.{name}_proj": (H, H) for parent in ("self_attn", "attn") for name in "qkv"},
    "self_attn.qkv_proj": (3 * H, H), "mlp.gate": (M, H), "block_sparse_moe.gate": (M, H),
    **{f"mlp.experts.{expert}.{name}": shape for expert in range(M)
       for name, shape in {"w1": (I, H), "gate_proj": (I, H), "up_proj": (I, H), "down_proj": (H, I)}.items()},
}  # fmt: skip
PARAMETERS = {"mlp.experts.base_layer": (2 * I, H), "mlp.experts": (H, I), "block_sparse_moe.experts": (I, H)}
PREFIXES = st.sampled_from(
    ["model.layers.0.", "model.language_model.layers.0.", "layers.0.", "_orig_mod.model.layers.0."]
)


def fitting(prefix: str, names: list[str], rank: int) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for name in names:
        out_features, in_features = FITTING.get(name) or PARAMETERS[name]
        ranks = rank * M if name in PARAMETERS else rank
        shapes[f"{prefix}{name}.lora_A.weight"] = [ranks, in_features]
        shapes[f"{prefix}{name}.lora_B.weight"] = [out_features, ranks]
    return shapes


NAMES = st.lists(st.sampled_from([*FITTING, *PARAMETERS]), max_size=4, unique=True)
PAIRS = st.builds(fitting, PREFIXES, NAMES, st.sampled_from([1, 2]))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tensors=st.just({}) | ANY,
    pairs=PAIRS,
    base=st.sampled_from(BASES),
    config=st.fixed_dictionaries(
        {},
        optional={
            "use_dora": st.booleans(),
            "peft_version": st.sampled_from(["0.17.0", "0.21.0"]),
            "target_parameters": st.lists(st.sampled_from(["gate.weight", "experts.down_proj"])),
            "rank_pattern": st.dictionaries(st.sampled_from(["q_proj", "experts.0.w1", ".*"]), st.sampled_from([1, 2])),
            "bias": st.sampled_from(["all", "none", "lora_only"]),
        },
    ),
)
def test_every_tensor_is_bound_or_the_adapter_is_refused(
    tmp_path: Path,
    tensors: dict[str, list[int]],
    pairs: dict[str, list[int]],
    base: BaseSpec,
    config: dict[str, object],
) -> None:
    shapes = tensors | pairs
    directory = save_peft(tmp_path / "a", {key: torch.ones(shape) for key, shape in shapes.items()}, **config)
    found = answer(Job(str(directory), (os.path.realpath(tmp_path),), base))
    if isinstance(found, Verified):
        assert json.loads(found.content.description)["bound_tensors"] == len(shapes)
    else:
        assert found.details == "" and len(found.message.encode()) <= MAX_MESSAGE_BYTES, found
