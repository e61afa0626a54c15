"""What is served in the benchmarks: models, adapters and requests, all made from seeds."""

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

NUM_ADAPTERS = 8
# the demo's plain LoRA and ESFT adapters: those that every commit serves, and (the LoRA) PEFT too in mixed batches
DEMO = ("emoji", "french-numbers", "intent", "iso-date", "json", "roman", "spanish", "sql")
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# kinds of low-rank adapters on a mixture -> keyword arguments of peft.LoraConfig
KINDS: dict[str, dict[str, Any]] = {
    "lora": dict(target_modules=_ATTENTION),
    "dora": dict(target_modules=_ATTENTION, use_dora=True),
    "router": dict(target_modules=[], target_parameters=["mlp.gate.weight"]),
    "experts": dict(target_modules=[], target_parameters=_EXPERTS),
}


@dataclass(frozen=True)
class Job:
    """One request: prompt as token ids, and the adapter's name (None for the base)."""

    prompt: list[int]
    adapter: str | None


def make_llama(directory: Path, num_adapters: int = NUM_ADAPTERS) -> None:
    """A random Llama of about 36 million parameters, with LoRA adapters on all linears, ranks 8 and 16 in turns."""
    import peft

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=10, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=8192, max_position_embeddings=1024, bos_token_id=None, eos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory / "base")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    for index in range(num_adapters):
        rank = 16 if index % 2 else 8
        lora = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, init_lora_weights=False,
                               task_type="CAUSAL_LM")  # fmt: skip
        wrapped = peft.get_peft_model(model, lora)
        wrapped.save_pretrained(directory / "adapters" / f"lora-{index}")
        model = wrapped.unload()
    write_tokenizer(directory / "base", config.vocab_size)


def make_mixture(directory: Path, rank: int = 8) -> None:
    """A random mixture of about 37 million parameters, 16 experts of which a token takes 4, with NUM_ADAPTERS adapters
    of each of KINDS."""
    import peft

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=384, moe_intermediate_size=192, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
        head_dim=64, num_experts=16, num_experts_per_tok=4, vocab_size=8192, max_position_embeddings=1024,
        bos_token_id=None, eos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory / "base")
    for kind, targets in KINDS.items():
        for index in range(NUM_ADAPTERS):
            lora = peft.LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights=False, task_type="CAUSAL_LM",
                                   **targets)  # fmt: skip
            wrapped = peft.get_peft_model(model, lora)
            wrapped.save_pretrained(directory / "adapters" / f"{kind}-{index}")
            model = wrapped.unload()
    write_tokenizer(directory / "base", config.vocab_size)


def copy_demo(directory: Path) -> None:
    """The demo without its end-of-sequence token, so that every request generates as many tokens as it asks for."""
    demo = Path(__file__).resolve().parent.parent / "demo"
    shutil.copytree(demo / "base", directory / "base")
    for name in DEMO:
        shutil.copytree(demo / "adapters" / name, directory / "adapters" / name)
    for name in ("config.json", "generation_config.json"):
        file = directory / "base" / name
        if file.exists():
            file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": None}))


def make_jobs(count: int, adapters: Sequence[str | None], vocab_size: int, seed: int) -> list[Job]:
    """Prompts of 64 to 256 random ids; adapter i with a probability like 1 / (i + 1); None is the base.

    The prompts depend on the seed alone: the same seed with other adapters asks for the same work.
    """
    rng, chooser = random.Random(seed), random.Random(f"adapters {seed}")
    weights = [1 / (index + 1) for index in range(len(adapters))]
    return [
        Job(
            [rng.randrange(4, vocab_size) for _ in range(rng.randint(64, 256))],
            chooser.choices(adapters, weights)[0] if adapters else None,
        )
        for _ in range(count)
    ]


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """Token i is spelled "<i>". Prompts are sent as ids, but a server needs a tokenizer to start, and answers text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"<{index}>": index for index in range(vocab_size)}, unk_token="<0>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    # without it Transformers makes a tokenizer of the model's family out of it, which refuses this one
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
