"""The models of the suites, made from seeds, with lively answers: see `enliven`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from benchmarks.workload import NUM_ADAPTERS, copy_demo, make_llama, write_tokenizer

CONTEXT = 8192
_LIVELIER = 4.0
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TUNED = 2  # experts of a layer that an ESFT adapter replaces


def llama(directory: Path, num_adapters: int = NUM_ADAPTERS) -> None:
    """Workload A's: make_llama's, with a context that long prompts fit in."""
    make_llama(directory, num_adapters)
    _set(directory / "base" / "config.json", max_position_embeddings=CONTEXT)
    enliven(directory / "base")


def mixture(directory: Path, num_esft: int = NUM_ADAPTERS) -> None:
    """A Qwen3 mixture of about 61 million parameters, 16 experts of which a token takes 4. Adapters: NUM_ADAPTERS of
    LoRA on attention, `lora-i`, and `num_esft` of ESFT with TUNED experts a layer, `esft-i`."""
    import peft

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=512, moe_intermediate_size=256, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
        head_dim=64, num_experts=16, num_experts_per_tok=4, vocab_size=8192, max_position_embeddings=CONTEXT,
        bos_token_id=None, eos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory / "base")
    for index in range(NUM_ADAPTERS):
        lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=_ATTENTION, init_lora_weights=False,
                               task_type="CAUSAL_LM")  # fmt: skip
        wrapped = peft.get_peft_model(model, lora)
        wrapped.save_pretrained(str(directory / "adapters" / f"lora-{index}"))
        model = wrapped.unload()
    write_tokenizer(directory / "base", config.vocab_size)
    enliven(directory / "base")
    weights = load_file(directory / "base" / "model.safetensors")
    for index in range(num_esft):
        generator = torch.Generator().manual_seed(index)
        tuned = {layer: sorted(torch.randperm(config.num_experts, generator=generator)[:TUNED].tolist())
                 for layer in range(config.num_hidden_layers)}  # fmt: skip
        esft(directory / "adapters" / f"esft-{index}", weights, tuned, generator)


def demo(directory: Path) -> None:
    """copy_demo's, with a tokenizer whose text spells token ids: prompts are ids, and answers are compared as ids."""
    copy_demo(directory)
    for file in (directory / "base").glob("tokenizer*"):
        file.unlink()
    write_tokenizer(directory / "base", vocab_size(directory))


def esft(
    directory: Path, weights: dict[str, torch.Tensor], tuned: dict[int, list[int]], generator: torch.Generator
) -> None:
    """Tuned experts, by layer, are the base's with noise of half their size."""
    tensors = {}
    for layer, experts in tuned.items():
        for expert in experts:
            for matrix in ("gate_proj", "up_proj", "down_proj"):
                name = f"model.layers.{layer}.mlp.experts.{expert}.{matrix}.weight"
                weight = weights[name]
                noise = torch.randn(weight.shape, generator=generator)
                tensors[name] = weight + 0.5 * weight.std() * noise
    directory.mkdir(parents=True)
    file = "model-00001-of-000001.safetensors"
    save_file(tensors, directory / file)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, file)}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "expert_cfg.json").write_text(
        json.dumps({"experts": tuned, "shared_experts": False, "non_expert_modules": False})
    )


def enliven(base: Path) -> None:
    """Scale the layers' matrices. As Transformers draws them, a token's own embedding outweighs what the layers add to
    it: such a model repeats the prompt's last token whatever its attention does, and an answer would prove little."""
    file = base / "model.safetensors"
    weights = load_file(file)
    for name, weight in weights.items():
        if ".layers." in name and weight.dim() > 1 and ".mlp.gate.weight" not in name:
            weight *= _LIVELIER
    save_file(weights, file, metadata={"format": "pt"})


def _set(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def parameters(directory: Path) -> tuple[int, int]:
    """(of the layers, of the embedding, which is the head too)."""
    sizes = {name: it.numel() for name, it in load_file(directory / "base" / "model.safetensors").items()}
    layers = sum(size for name, size in sizes.items() if ".layers." in name)
    return layers, sum(sizes.values()) - layers


def kv_bytes(directory: Path) -> int:
    """Of one token's keys and values, float32."""
    it = json.loads((directory / "base" / "config.json").read_text())
    head = it.get("head_dim") or it["hidden_size"] // it["num_attention_heads"]
    return int(2 * it["num_hidden_layers"] * it["num_key_value_heads"] * head * 4)


def size_bytes(directory: Path) -> int:
    """Of the base's weights in float32."""
    return 4 * sum(parameters(directory))


def adapters_bytes(directory: Path, names: list[str]) -> int:
    return sum(file.stat().st_size for name in names for file in (directory / "adapters" / name).glob("*.safetensors"))


def vocab_size(directory: Path) -> int:
    return int(json.loads((directory / "base" / "config.json").read_text())["vocab_size"])


class Models:
    """Makes each once below a directory, which is the caller's to remove."""

    MAKERS: ClassVar[dict[str, Callable[[Path], None]]] = {
        "llama": llama,
        "llama-128": lambda directory: llama(directory, 128),
        "mixture": mixture,
        "demo": demo,
    }

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def get(self, name: str) -> Path:
        directory = self._directory / name
        if not directory.exists():
            made = self._directory / f"{name}.part"
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir(parents=True)
            self.MAKERS[name](made)
            made.rename(directory)
        return directory
