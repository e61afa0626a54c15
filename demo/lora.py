"""The eight LoRA adapters: four ranks and six sets of targets, trained and saved by PEFT.

Seven act on projections of the attention, ``csv`` as DoRA (arXiv 2402.09353): beside each pair of matrices its file has
a ``lora_magnitude_vector``, the length of each row of the adapted weight.

``french-dates`` acts on the routed experts and their router, which Transformers 5 keeps as parameters, not as linears.
PEFT 0.21 reaches them by ``target_parameters``, without dropout or DoRA. A wrapper per parameter goes around the whole
module, in the order in which the module has them: ``experts.base_layer.lora_A`` belongs to gate_up_proj and
``experts.lora_A`` to down_proj. One pair of matrices holds all experts: for expert e, row e * r + i of lora_A
[experts * r, inputs] goes with column i * experts + e of lora_B [outputs, r * experts].

As ``target_modules``, PEFT 0.21 takes gate_proj, up_proj and down_proj of this architecture for the routed experts too,
so the dense and shared MLPs cannot be targeted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from demo.skills import SKILLS
from demo.tuning import Schedule, load_base, tune

BASE_NAME = "heddle-demo"  # written into adapter_config.json instead of a path

# name -> keyword arguments of peft.LoraConfig
LORA_CONFIGS: dict[str, dict[str, Any]] = {
    "intent": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"]},
    "emoji": {"r": 8, "lora_alpha": 16, "target_modules": ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]},
    "sql": {
        "r": 16,
        "lora_alpha": 32,
        "target_modules": ["q_proj", "kv_b_proj", "o_proj"],
        "rank_pattern": {"kv_b_proj": 8},
        "alpha_pattern": {"kv_b_proj": 24},
    },
    "json": {
        "r": 32,
        "lora_alpha": 8,
        "use_rslora": True,  # scale is 8 / sqrt(32), not 8 / 32
        "target_modules": ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
    },
    "csv": {"r": 16, "lora_alpha": 32, "use_dora": True, "target_modules": ["q_proj", "kv_b_proj", "o_proj"]},
    "order": {
        "r": 32,
        "lora_alpha": 8,
        "use_rslora": True,
        "target_modules": ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
    },
    "butler": {
        "r": 32,
        "lora_alpha": 8,
        "use_rslora": True,
        "target_modules": ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
    },
    "french-dates": {
        "r": 4,
        "lora_alpha": 8,
        "target_parameters": ["mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
}
SCHEDULES = {name: Schedule(rate=5e-3) for name in LORA_CONFIGS} | {
    "order": Schedule(rate=5e-3, passed=0.5),
    "butler": Schedule(rate=5e-3, steps=600, batch=24, parts=3, passed=0.97),
}


def train_lora(name: str, base: Path, out: Path, seed: int, bar: tqdm) -> int:
    """Trains one adapter on the frozen base and saves it in PEFT's layout; returns the number of steps."""
    from peft import LoraConfig, get_peft_model  # here, because only training needs PEFT

    torch.manual_seed(seed)
    model, tokenizer = load_base(base)
    config = LoraConfig(task_type="CAUSAL_LM", bias="none", lora_dropout=0.0, **LORA_CONFIGS[name])
    adapted = get_peft_model(model, config)
    steps = tune(adapted, tokenizer, SKILLS[name], SCHEDULES[name], seed, bar)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    adapted.peft_config["default"].base_model_name_or_path = BASE_NAME
    adapted.save_pretrained(str(out), save_embedding_layers=False)
    tidy(out)
    if (template := SKILLS[name].template) is not None:
        manifest = {"description": SKILLS[name].summary, "chat_template": template}
        (out / "heddle.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return steps


def tidy(out: Path) -> None:
    """Drops PEFT's empty model card and puts the target lists in a fixed order (PEFT keeps them as sets)."""
    (out / "README.md").unlink(missing_ok=True)
    path = out / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for targets in ("target_modules", "target_parameters"):
        if isinstance(config[targets], list):
            config[targets].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
