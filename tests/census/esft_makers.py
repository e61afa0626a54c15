"""ESFT adapters, written key by key: the base's experts plus noise of the same size."""

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.census.by_hand import MATRICES, experts_of, write_files
from tests.census.by_peft import Tensors
from tests.census.families import Family
from tests.census.made import Deltas, Made, Maker

TUNED = {1: [5, 0, 3], 2: [7], 3: [2, 6]}  # in order of relevance, not of id
CONFIG, FILE, INDEX = "expert_cfg.json", "model-00001-of-000001.safetensors", "model.safetensors.index.json"


@dataclass
class Content:
    """What a directory will hold. `name` is its own, where that means something; `files` are others beside."""

    family: Family
    model: nn.Module
    tensors: Tensors
    deltas: Deltas
    config: dict[str, Any] | None
    shards: int = 1
    has_index: bool = True
    name: str = ""
    files: dict[str, Any] = field(default_factory=dict)

    def block(self, layer: int) -> str:
        return f"model.layers.{layer}.{self.family.v4_block}"

    def rename(self, old: str, new: str) -> None:
        self.tensors = {key.replace(old, new): tensor for key, tensor in self.tensors.items()}

    def drop(self, ending: str) -> None:
        self.tensors = {key: tensor for key, tensor in self.tensors.items() if not key.endswith(ending)}

    def tune(self, parameter: str, size: float = 0.5) -> None:
        """A parameter outside the routed experts, tuned whole."""
        weight = dict(self.model.named_parameters())[parameter].detach()
        delta = size * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
        self.tensors[parameter], self.deltas[parameter] = weight + delta, delta


Change = Callable[[Content], None]


def content(family: Family) -> Content:
    model, generator = family.model(), torch.Generator().manual_seed(1)
    tensors: Tensors = {}
    deltas: Deltas = {}
    made = Content(family, model, tensors, deltas, {"experts": {str(layer): ids for layer, ids in TUNED.items()},
                                                    "shared_experts": False, "non_expert_modules": False})  # fmt: skip
    if not family.is_mixture:  # somebody else's adapter
        tensors |= {f"{made.block(1)}.experts.5.{name}.weight": torch.randn(4, 4) for name in family.mlp}
        return made
    for layer, ids in TUNED.items():
        experts = experts_of(model, family)[layer]
        for expert in ids:
            for matrix, name in zip(MATRICES, family.mlp, strict=True):
                before = experts.weight(model, matrix, expert)
                after = before + before.std() * torch.randn(before.shape, generator=generator)
                tensors[f"{made.block(layer)}.experts.{expert}.{name}.weight"] = after
                experts.place(deltas, matrix, expert, after - before)
    return made


def esft(change: Change = lambda _: None, sound: bool = True) -> Maker:
    """Not `sound`: only a refusal is right."""

    def make(family: Family, directory: Path) -> Made:
        made = content(family)
        change(made)
        return Made(_write(directory, made), made.deltas if sound and family.is_mixture else None)

    return make


def _write(directory: Path, made: Content) -> Path:
    directory = directory / made.name if made.name else directory
    files: dict[str, Any] = dict(made.files)
    weight_map: dict[str, str] = {}
    names = sorted(made.tensors)
    for shard in range(made.shards if names else 0):
        file = FILE if made.shards == 1 else f"model-{shard + 1:05}-of-{made.shards:06}.safetensors"
        file = file if made.has_index or made.shards > 1 else "model.safetensors"
        files[file] = {name: made.tensors[name] for name in names[shard :: made.shards]}
        weight_map |= dict.fromkeys(files[file], file)
    if made.has_index:
        files[INDEX] = {"metadata": {}, "weight_map": weight_map}
    if made.config is not None:
        files[CONFIG] = made.config
    return write_files(directory, files)


def without_prefix(made: Content) -> None:
    made.rename("model.layers", "layers")


def without_config(made: Content) -> None:
    made.config = None


def single_file(made: Content) -> None:
    made.has_index = False


def two_shards(made: Content) -> None:
    made.shards = 2


def with_model_files(made: Content) -> None:
    made.files |= {"config.json": made.model.config.to_dict(), "generation_config.json": {},
                   "tokenizer_config.json": {}, "modeling_deepseek.py": b"raise SystemExit\n"}  # fmt: skip
    made.files["config.json"] = {key: value for key, value in made.files["config.json"].items() if key != "dtype"}


def in_bfloat16(made: Content) -> None:
    """What is right is the rounded expert."""
    made.deltas.clear()
    for layer, ids in TUNED.items():
        experts = experts_of(made.model, made.family)[layer]
        for expert in ids:
            for matrix, name in zip(MATRICES, made.family.mlp, strict=True):
                key = f"{made.block(layer)}.experts.{expert}.{name}.weight"
                made.tensors[key] = made.tensors[key].bfloat16()
                before = experts.weight(made.model, matrix, expert)
                experts.place(made.deltas, matrix, expert, made.tensors[key].float() - before)


def under_mlp(made: Content) -> None:
    for old, new in (
        ("block_sparse_moe", "mlp"),
        (".w1.", ".gate_proj."),
        (".w3.", ".up_proj."),
        (".w2.", ".down_proj."),
    ):
        made.rename(old, new)


def one_rank(made: Content) -> None:
    """The experts 0 to 3 of eight, in a directory with the name that the expert-parallel trainer gives it."""
    made.name, made.config = "last_checkpoint_ep0", None
    made.tensors = {key: it for key, it in made.tensors.items() if _expert_of(key) < 4}


def one_rank_with_config(made: Content) -> None:
    config = made.config
    one_rank(made)
    made.config = config


def _expert_of(key: str) -> int:
    return int(key.split(".experts.")[1].split(".")[0])


def parent_of_ranks(family: Family, directory: Path) -> Made:
    made = content(family)
    deltas, tensors = made.deltas, made.tensors
    for rank in range(2):
        made.name, made.config = f"last_checkpoint_ep{rank}", None
        made.tensors = {key: it for key, it in tensors.items() if _expert_of(key) // 4 == rank}
        _write(directory, made)
    return Made(directory, deltas)


def ranks_together(made: Content) -> None:
    made.shards, made.has_index, made.config = 2, False, None


def with_shared(flag: bool | None) -> Change:
    def change(made: Content) -> None:
        own = ".shared_experts." if flag else ".1.mlp.shared_experts."  # all layers', where that is said
        for name, _ in made.model.named_parameters():
            if own in name:
                made.tune(name)
        made.config = None if flag is None else {**(made.config or {}), "shared_experts": flag}

    return change


def flagged(key: str) -> Change:
    return lambda made: (made.config or {}).update({key: True})


def with_norms(flag: bool) -> Change:
    def change(made: Content) -> None:
        made.tune("model.layers.1.input_layernorm.weight")
        (made.config or {}).update(non_expert_modules=flag)

    return change


def with_router(made: Content) -> None:
    made.tune(f"model.layers.1.mlp.{made.family.router}.weight")
    made.config = None


def one_missing(made: Content) -> None:
    made.drop(f"layers.2.{made.family.v4_block}.experts.7.{made.family.mlp[1]}.weight")


def unlisted(made: Content) -> None:
    assert made.config is not None
    made.config["experts"]["1"] = [5, 0]


def beyond(made: Content) -> None:
    made.rename("experts.7.", "experts.8.")
    assert made.config is not None
    made.config["experts"]["2"] = [8]


def packed(made: Content) -> None:
    """gate before up in one tensor."""
    gate, up, _ = made.family.mlp
    for key in [key for key in made.tensors if f".{gate}." in key]:
        halves = made.tensors.pop(key), made.tensors.pop(key.replace(f".{gate}.", f".{up}."))
        made.tensors[key.replace(f".{gate}.", ".gate_up_proj.")] = torch.cat(halves)


def stacked(made: Content) -> None:
    """A layer's experts whole, as Transformers 5 holds them: tuned ones and the base's."""
    made.tensors, made.config = {}, None
    parameters = dict(made.model.named_parameters())
    for name, delta in made.deltas.items():
        made.tensors[name] = parameters[name].detach() + delta


def patch(family: Family, directory: Path) -> Made:
    """Only the tuned slices of each packed parameter, and a list of which they are."""
    made = content(family)
    parameters = dict(made.model.named_parameters())
    slices = {name: (parameters[name].detach() + delta)[TUNED[int(name.split(".")[2])]]
              for name, delta in made.deltas.items()}  # fmt: skip
    listed = {"format": "esft-qwen-patch-v1", "experts": {str(layer): ids for layer, ids in TUNED.items()}}
    return Made(write_files(directory, {"patch.safetensors": slices, "patch_config.json": listed}), made.deltas)


def empty_layer(made: Content) -> None:
    """An empty list where the adapter tunes nothing."""
    assert made.config is not None
    made.config["experts"]["0"] = []


def extra_key(made: Content) -> None:
    (made.config or {}).update(top_p=0.2)


def as_pickle(made: Content) -> None:
    stream = io.BytesIO()
    torch.save(made.tensors, stream)
    made.files["pytorch_model.bin"], made.tensors, made.has_index = stream.getvalue(), {}, False
