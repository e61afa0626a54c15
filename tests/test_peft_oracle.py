"""The oracle with PEFT as its judge: what PEFT computes with an adapter alone, a mixed batch computes too.

Adapters are saved by PEFT and read by us; the references are PEFT's own model of the same directory, which has never
seen our reading of it.
"""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from server.model.probe import PROBE
from tests.support.breadth import always
from tests.support.engine_harness import Engine, prompts
from tests.support.tiny_adapters import ATTENTION, merge, register, save_esft, save_lora
from tests.support.tiny_models import make_model, reference

pytestmark = [
    pytest.mark.slow,
    # PEFT looks for what a pattern matches among modules only, and then matches parameters with it
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match any targeted module"),
]

MLA = ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
LATENT = ("q_a_proj", "q_b_proj", *MLA)
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
NEW_TOKENS = 10

# model -> attention's linears, and its router (None: it has none)
DENSE = {"llama": ATTENTION, "qwen2": ATTENTION, "gemma2": ATTENTION, "phi3": ("qkv_proj", "o_proj", "gate_up_proj")}
MIXTURES = {
    "mixtral-window": (ATTENTION, "gate"),
    "qwen2_moe": (ATTENTION, "gate"),
    "qwen3_moe": (ATTENTION, "gate"),
    "olmoe": (ATTENTION, "gate"),
    "deepseek_v2": (("q_proj", *MLA), "gate"),
    "deepseek_v3": (LATENT, "gate"),
    "gpt_oss": (ATTENTION, "router"),
}


def adapters_for(root: Path, name: str) -> dict[str, Path]:
    """By what they are, each of its own rank and scale."""
    model = make_model(name)
    attention, router = MIXTURES[name] if name in MIXTURES else (DENSE[name], None)

    def save(title: str, **config: Any) -> Path:
        return save_lora(root / title, model, len(title), config.pop("targets", ()), **config)

    made = {
        "plain": save("plain", targets=attention, rank=5),
        "dora": save("dora", targets=attention, use_dora=True, alpha=6),
        "dora-rs": save("dora-rs", targets=attention[-2:], use_dora=True, use_rslora=True,
                        rank_pattern={attention[-1]: 2}),
    }  # fmt: skip
    if router is not None:
        gate = f"mlp.{router}.weight"
        made["experts"] = save("experts", rank=3, target_parameters=EXPERTS)
        made["down"] = save("down", rank=2, target_parameters=EXPERTS[1:])
        made["up"] = save("up", rank=6, alpha=9, target_parameters=EXPERTS[:1], use_rslora=True)
        made["router"] = save("router", rank=2, target_parameters=[gate])
        made["all"] = save("all", targets=attention, rank=4, target_parameters=[*EXPERTS, gate],
                           rank_pattern={"gate_up_proj": 7, attention[0]: 3},
                           alpha_pattern={"mlp.experts.down_proj": 3.0})  # fmt: skip
        if name != "gpt_oss":  # whose experts no ESFT adapter exists for
            made["esft"] = save_esft(root / "esft", model, 3, {1: [5, 0], 2: [7], 3: [2, 6]})
    return made


@pytest.mark.parametrize("name", always([*DENSE, *MIXTURES], "llama", "phi3", "qwen3_moe", "deepseek_v3", "gpt_oss"))
def test_a_mixed_batch_equals_peft_with_each_adapter_alone(name: str, tmp_path: Path) -> None:
    engine = Engine(make_model(name, attention=PROBE), adapter_slots=9, tokens_per_step=40, max_running=16)
    made = adapters_for(tmp_path, name)
    entries = {title: register(engine, path) for title, path in made.items()}
    engine.bring_in([*entries.values()])
    asked = {title: [engine.add(prompt, NEW_TOKENS, entry.ref) for prompt in prompts(3)]
             for title, entry in entries.items()}  # fmt: skip
    plain = make_model(name)
    for_base = [engine.add(prompt, NEW_TOKENS) for prompt in prompts(3)]
    engine.run()
    assert max(len(slots) for slots in engine.slots_of_steps) == 1 + len(made)  # all of them shared steps
    base = [reference(plain, answer.prompt, NEW_TOKENS) for answer in for_base]
    assert [answer.tokens for answer in for_base] == base
    for title, answers in asked.items():
        if title == "esft":
            judge = merge(make_model(name), entries[title])
        else:
            judge = peft.PeftModel.from_pretrained(make_model(name), made[title]).eval()
        with torch.inference_mode():
            wanted = [_generate(judge, answer.prompt) for answer in answers]
        assert [answer.tokens for answer in answers] == wanted, title
        assert wanted != base, f"{title} makes no difference"


def _generate(model: Any, prompt: list[int]) -> list[int]:
    ids = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False,
                         eos_token_id=None)  # fmt: skip
    told: list[int] = ids[0, len(prompt) :].tolist()
    return told
