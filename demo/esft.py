"""The four ESFT adapters: score the experts on the task, choose, tune only those, save (arXiv 2407.01906).

An ESFT adapter on disk is a folder with the absolute weights of the tuned experts, one tensor per projection, and
``expert_cfg.json`` that says which experts of which layer they are.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from demo.skills import SKILLS, Skill
from demo.tuning import Batch, Schedule, batches, load_base, tune

SHARD = "model-00001-of-000001.safetensors"  # five and six digits, as in the published adapters
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
Experts = dict[int, list[int]]  # layer -> experts in descending order of their score


@dataclass(frozen=True)
class Recipe:
    """``score``: share of tokens that select an expert, or its mean gate; ``share``: the paper's threshold p.

    The paper takes p = 0.2 (token) and 0.1 (gate) of 64 experts; with 16 small ones more have to join in. ``prefix``
    is how tensor names start: the published adapters come with and without "model.".
    """

    score: Literal["token", "gate"]
    share: float
    prefix: str = "model.layers"
    schedule: Schedule = Schedule(rate=8e-3)


RECIPES = {
    "french-numbers": Recipe("token", 0.5),
    "roman": Recipe("gate", 0.5),
    "iso-date": Recipe("token", 0.4, prefix="layers"),
    "spanish": Recipe("gate", 0.6),
}


@torch.inference_mode()
def affinity(model: PreTrainedModel, batch: Batch, score: Literal["token", "gate"]) -> dict[int, torch.Tensor]:
    """Scores of all experts on a batch, [experts] per MoE layer, each normalised to a sum of one (paper, section 3)."""
    keep = batch.mask.flatten().bool()
    scores: dict[int, torch.Tensor] = {}

    def listen(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
            logits, weights, chosen = output  # [tokens, experts], [tokens, top_k], [tokens, top_k]
            shares = weights if score == "gate" else torch.ones_like(weights)
            totals = torch.zeros_like(logits).scatter_(1, chosen, shares)[keep].mean(0)
            scores[layer] = totals / totals.sum()

        return hook

    moe_layers = [(i, layer.mlp) for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]
    hooks = [mlp.gate.register_forward_hook(listen(i)) for i, mlp in moe_layers]
    try:
        model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return scores


def select(scores: dict[int, torch.Tensor], share: float) -> Experts:
    """Per layer the best experts until their scores add up to ``share`` (the paper's rule)."""
    chosen: Experts = {}
    for layer, values in scores.items():
        order = values.argsort(descending=True, stable=True)
        count = int((values[order].cumsum(0) < share).sum()) + 1
        chosen[layer] = order[:count].tolist()
    return chosen


class TunedRows(nn.Module):
    """Parametrization of a fused expert tensor [experts, ...]: the rows of some experts are trained, others stay."""

    def __init__(self, full: torch.Tensor, experts: list[int]) -> None:
        super().__init__()
        self.register_buffer("experts", torch.tensor(experts), persistent=False)
        self.rows = nn.Parameter(full.detach()[experts].clone())

    def forward(self, full: torch.Tensor) -> torch.Tensor:
        return full.index_copy(0, self.experts, self.rows)


def open_experts(model: PreTrainedModel, chosen: Experts) -> None:
    """Makes the chosen experts the model's only trainable parameters."""
    model.requires_grad_(False)
    for layer, experts in chosen.items():
        module = model.model.layers[layer].mlp.experts
        for name in ("gate_up_proj", "down_proj"):
            parametrize.register_parametrization(module, name, TunedRows(getattr(module, name), experts))


def tuned_weights(model: PreTrainedModel, chosen: Experts, prefix: str) -> dict[str, torch.Tensor]:
    """The chosen experts as separate bf16 tensors: gate and up [intermediate, hidden], down [hidden, intermediate]."""
    tensors = {}
    for layer, experts in chosen.items():
        module = model.model.layers[layer].mlp.experts
        for expert in experts:
            gate, up = module.gate_up_proj[expert].chunk(2, dim=0)
            for name, weight in zip(PROJECTIONS, (gate, up, module.down_proj[expert]), strict=True):
                key = f"{prefix}.{layer}.mlp.experts.{expert}.{name}.weight"
                tensors[key] = weight.detach().to(torch.bfloat16).clone()
    return tensors


def save_esft(out: Path, chosen: Experts, tensors: dict[str, torch.Tensor]) -> None:
    """Writes the adapter in ESFT's layout."""
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / SHARD, metadata={"format": "pt"})
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(sorted(tensors), SHARD)}
    config = {
        "experts": {str(layer): experts for layer, experts in chosen.items()},
        "shared_experts": False,
        "non_expert_modules": False,
    }
    for name, content in (("model.safetensors.index.json", index), ("expert_cfg.json", config)):
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_esft(model: PreTrainedModel, path: Path) -> Experts:
    """Overwrites the experts of a plain Transformers model with an adapter's; returns which ones."""
    config = json.loads((path / "expert_cfg.json").read_text(encoding="utf-8"))
    weights: dict[tuple[int, int], dict[str, torch.Tensor]] = defaultdict(dict)
    for key, tensor in load_file(path / SHARD).items():
        parts = (
            key.removeprefix("model.").removeprefix("layers.").split(".")
        )  # layer, mlp, experts, expert, name, weight
        weights[int(parts[0]), int(parts[3])][parts[4]] = tensor
    with torch.no_grad():
        for (layer, expert), tuned in weights.items():
            module = model.model.layers[layer].mlp.experts
            module.gate_up_proj[expert] = torch.cat([tuned["gate_proj"], tuned["up_proj"]]).to(module.gate_up_proj)
            module.down_proj[expert] = tuned["down_proj"].to(module.down_proj)
    return {int(layer): experts for layer, experts in config["experts"].items()}


def choose_experts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, skill: Skill, recipe: Recipe, seed: int
) -> Experts:
    """Scores the frozen base on 256 training chats of the skill and chooses."""
    return select(affinity(model, next(batches(tokenizer, skill, seed, 256)), recipe.score), recipe.share)


def train_esft(name: str, base: Path, out: Path, seed: int, bar: tqdm) -> int:
    """Trains one adapter on the frozen base and saves it; returns the number of steps."""
    torch.manual_seed(seed)
    model, tokenizer = load_base(base)
    recipe = RECIPES[name]
    chosen = choose_experts(model, tokenizer, SKILLS[name], recipe, seed)
    open_experts(model, chosen)
    steps = tune(model, tokenizer, SKILLS[name], recipe.schedule, seed, bar)
    save_esft(out, chosen, tuned_weights(model, chosen, recipe.prefix))
    return steps
