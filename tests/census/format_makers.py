"""The same plain LoRA in other forms, and forms of which only a refusal is right."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.census import by_hand, by_peft
from tests.census.by_hand import PEFT, Noise, scale
from tests.census.by_peft import CONFIG, WEIGHTS, Tensors, plain, rewritten, write
from tests.census.families import Family, parents
from tests.census.made import Deltas, Made, Maker

Parts = tuple[str, tuple[str, ...]]  # a fused linear, and the linears that are its rows
QKV: Parts = ("qkv_proj", ("q_proj", "k_proj", "v_proj"))
GATE_UP: Parts = ("gate_up_proj", ("gate_proj", "up_proj"))
Change = by_peft.Change


def renamed(rename: Callable[[str], str], of: Maker | None = None) -> Maker:
    return rewritten(lambda tensors, *_: {rename(key): tensor for key, tensor in tensors.items()}, of)


def unsound(change: Change, of: Maker | None = None) -> Maker:
    """Nothing is right but a refusal."""

    def make(family: Family, directory: Path) -> Made:
        return Made(rewritten(change, of)(family, directory).path, None)

    return make


def peft_0_2(tensors: Tensors, written: dict[str, Any], family: Family) -> None:
    kept = {"base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "lora_alpha", "lora_dropout",
            "modules_to_save", "peft_type", "r", "target_modules", "task_type"}  # fmt: skip
    for key in set(written) - kept:
        del written[key]
    written |= {"enable_lora": None, "merge_weights": False}


def without_config(family: Family, directory: Path) -> Made:
    origin = plain(family, directory)
    path = write(directory, load_file(origin / WEIGHTS), {})
    (path / CONFIG).unlink()
    return Made(path, None)


def ignoring(key: str, value: object) -> Maker:
    def make(family: Family, directory: Path) -> Made:
        made = by_peft.configured(**{key: value})(family, directory)
        return Made(made.path, made.truth, ignore_keys=(key,))

    return make


def pickled(beside: bool) -> Maker:
    """As PEFT wrote before 0.7; `beside`: there is a safetensors file too."""

    def make(family: Family, directory: Path) -> Made:
        origin = plain(family, directory)
        tensors = load_file(origin / WEIGHTS)
        path = write(directory, tensors, json.loads((origin / CONFIG).read_text()))
        torch.save(tensors, path / "adapter_model.bin")
        if not beside:
            (path / WEIGHTS).unlink()
        return Made(path, origin)

    return make


def sharded(family: Family, directory: Path) -> Made:
    origin = plain(family, directory)
    tensors = load_file(origin / WEIGHTS)
    path = write(directory, tensors, json.loads((origin / CONFIG).read_text()))
    (path / WEIGHTS).unlink()
    weight_map: dict[str, str] = {}
    for shard in range(2):
        part = {key: tensors[key] for key in sorted(tensors)[shard::2]}
        file = f"adapter_model-{shard + 1:05}-of-00002.safetensors"
        save_file(part, path / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    return Made(path, origin)


def _hole(tensors: Tensors, written: dict[str, Any], family: Family) -> None:
    for key in tensors:
        if ".layers.1." in key and "lora_B" in key:
            tensors[key] = tensors[key][:0]


def _layer_seven(tensors: Tensors, written: dict[str, Any], family: Family) -> Tensors:
    return tensors | {key.replace(".layers.1.", ".layers.7."): it.clone() for key, it in tensors.items()}


def _wider(tensors: Tensors, written: dict[str, Any], family: Family) -> Tensors:
    return {key: torch.cat([it, it], dim=1) if "lora_A" in key else it for key, it in tensors.items()}


def _second_name(tensors: Tensors, written: dict[str, Any], family: Family) -> Tensors:
    name = {True: ".default.weight", False: ".other.weight"}
    return {key.replace(".weight", name["o_proj" in key]): tensor for key, tensor in tensors.items()}


def _half(tensors: Tensors, written: dict[str, Any], family: Family) -> None:
    del tensors[next(key for key in sorted(tensors) if "lora_B" in key)]


with_a_hole, deeper, wider = unsound(_hole), unsound(_layer_seven), unsound(_wider)
two_names, half_a_pair = unsound(_second_name), unsound(_half)


def two_layers(family: Family, directory: Path) -> Made:
    """What is right is PEFT's own with layers_to_transform: the others are as in the base."""
    origin = by_peft.save(family, directory.with_name(f"{directory.name}-origin"), layers_to_transform=[0, 1])
    written = json.loads((origin / CONFIG).read_text()) | {"layers_to_transform": None}
    return Made(write(directory, load_file(origin / WEIGHTS), written), origin)


def pruned(listed: bool) -> Maker:
    """Components were removed, and rank_pattern lists the ranks that are left, or does not.

    What was trained with alpha over the rank that was stays scaled by it, which only alpha_pattern can say to PEFT.
    Where rank_pattern lists the ranks, PEFT takes alpha over those."""

    def change(tensors: Tensors, written: dict[str, Any], family: Family) -> None:
        for key, tensor in tensors.items():
            if ".o_proj." in key:
                tensors[key] = tensor[:2] if "lora_A" in key else tensor[:, :2]
        if listed:
            written["rank_pattern"] = {"o_proj": 2}

    def make(family: Family, directory: Path) -> Made:
        path = rewritten(change)(family, directory).path
        if listed:
            return Made(path, path)
        written = json.loads((path / CONFIG).read_text())
        told = {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"o_proj": written["lora_alpha"] * 2 / written["r"]}}
        judged = directory.with_name(f"{directory.name}-judged")
        return Made(path, write(judged, load_file(path / WEIGHTS), written | told))

    return make


def with_vision(b: float) -> Maker:
    """Text keys as of a multimodal model, and LoRA on its vision tower: where B is zero, it changes nothing."""

    def change(tensors: Tensors, written: dict[str, Any], family: Family) -> Tensors:
        text = {key.replace(f"{PEFT}model.", f"{PEFT}model.language_model."): it for key, it in tensors.items()}
        module = f"{PEFT}model.visual.blocks.0.attn.q_proj"
        return text | {f"{module}.lora_A.weight": torch.ones(4, 32), f"{module}.lora_B.weight": torch.full((32, 4), b)}

    return unsound(change) if b else rewritten(change)


def _half_renamed(tensors: Tensors, written: dict[str, Any], family: Family) -> Tensors:
    return {key.replace(f"{PEFT}model.layers.1.", f"{PEFT}model.language_model.layers.1."): it
            for key, it in tensors.items()}  # fmt: skip


mixed_prefixes = rewritten(_half_renamed)


def with_head(family: Family, directory: Path, copy: bool) -> Made:
    """A head's weight in the file: the base's own, under the name that PEFT's default save gives it, or another."""
    origin = plain(family, directory)
    tensors, head = load_file(origin / WEIGHTS), family.model().get_submodule("lm_head").weight.detach()
    if copy:
        tensors[f"{PEFT}lm_head.base_layer.weight"] = head.clone()
    else:
        tensors[f"{PEFT}lm_head.weight"] = head + 0.5 * head.std() * torch.randn(head.shape)
    path = write(directory, tensors, json.loads((origin / CONFIG).read_text()))
    return Made(path, origin if copy else path)


def mlx(family: Family, directory: Path) -> Made:
    """A as [in, r], B as [r, out], and the scale itself."""
    origin = plain(family, directory)
    tensors = {
        key.removeprefix(PEFT).replace(".lora_A.weight", ".lora_a").replace(".lora_B.weight", ".lora_b"): it.T
        for key, it in load_file(origin / WEIGHTS).items()
    }
    written = {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0}}
    return Made(by_hand.write_files(directory, {"adapters.safetensors": tensors, CONFIG: written}), origin)


def fused(linears: Parts) -> Maker:
    """One A and one long B, where this base has a linear for each part."""

    def make(family: Family, directory: Path) -> Made:
        (name, parts), noise, model = linears, Noise(), family.model()
        tensors: Tensors = {}
        deltas: Deltas = {}
        for parent in parents(model, parts[0]):
            sizes = [model.get_submodule(f"{parent}.{part}").weight.shape for part in parts]
            a, b = noise(4, sizes[0][1]), noise(sum(size[0] for size in sizes), 4)
            tensors[f"{PEFT}{parent}.{name}.lora_A.weight"], tensors[f"{PEFT}{parent}.{name}.lora_B.weight"] = a, b
            for part, rows in zip(parts, b.split([size[0] for size in sizes]), strict=True):
                deltas[f"{parent}.{part}.weight"] = scale(4) * rows @ a
        return by_hand.write_lora(directory, tensors, deltas, target_modules=[name])

    return make


def split(linears: Parts, which: tuple[str, ...] = ()) -> Maker:
    """An A and a B for each part, where this base has one linear for all."""

    def make(family: Family, directory: Path) -> Made:
        (name, parts), noise, model = linears, Noise(), family.model()
        tensors: Tensors = {}
        deltas: Deltas = {}
        for parent in parents(model, name):
            outs, ins = model.get_submodule(f"{parent}.{name}").weight.shape
            sizes = _rows(model.config, outs, parts)
            deltas[f"{parent}.{name}.weight"] = torch.zeros(outs, ins)
            for part, rows in zip(parts, deltas[f"{parent}.{name}.weight"].split(sizes), strict=True):
                if not which or part in which:
                    a, b = noise(4, ins), noise(rows.shape[0], 4)
                    key = f"{PEFT}{parent}.{part}.lora"
                    tensors[f"{key}_A.weight"], tensors[f"{key}_B.weight"] = a, b
                    rows += scale(4) * b @ a
        return by_hand.write_lora(directory, tensors, deltas, target_modules=list(which or parts))

    return make


def _rows(config: Any, outs: int, parts: tuple[str, ...]) -> list[int]:
    if len(parts) == 2:
        return [outs // 2, outs // 2]
    size = config.hidden_size // config.num_attention_heads
    return [size * config.num_attention_heads, *[size * config.num_key_value_heads] * 2]
