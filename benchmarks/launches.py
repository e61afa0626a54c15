"""Launches of one layer of a decode step: counted by what is dispatched on a device without contents.

    python -m benchmarks.launches [MODEL...]        the base, and with every kind of adapter that the model takes

The models are tiny and have the structure of real ones: what is launched depends on structure alone. Counted is what
would launch a kernel, which is every op of ours and every one of torch's that is no view, no allocation and no
question; the difference between models of n and n + 1 layers is a layer's. Those on a branch run beside the others
(server/model/branch.py).
"""

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from kernels.adapter_rows import ShapeKey
from kernels.compiled import everywhere
from kernels.compiled.launch import traced
from kernels.lora import TABLE_FIELDS, LoraSite, SiteAdapters, Split
from server.model.branch import is_on_branch
from server.model.build import Build, Injected
from server.model.device_inputs import Capacity, DeviceInputs, Sizes
from server.model.experts import Stacks
from server.model.families import pin_rope
from server.model.forward import Model
from server.model.injections import inject
from server.model.inputs import CurrentStep
from server.model.lora_op import LoraOps
from server.model.probe import PROBE, probe
from server.model.product import product_of
from server.model.unlisted import list_unlisted
from server.weights.kv_memory import WholeKVMemory

META = torch.device("meta")
ROWS, BLOCKS, SLOTS, MOST_SLICES = 8, 16, 4, 16
BASE, LORA, ESFT, EVERYTHING = ShapeKey(), ShapeKey(64), ShapeKey(0, 1), ShapeKey(64, 1, 64)

# ops of torch that launch nothing: they make, view or ask
_FREE = ("empty", "new_empty", "view", "_unsafe_view", "alias", "detach", "t", "transpose", "permute", "expand",
         "slice", "select", "split", "split_with_sizes", "chunk", "unsqueeze", "squeeze", "as_strided", "unbind",
         "reshape", "unfold", "empty_like", "new_empty_strided", "empty_strided", "lift_fresh", "view_as_real",
         "view_as_complex", "_reshape_alias", "diagonal", "unflatten", "flatten", "is_same_size")  # fmt: skip


class Launches(NamedTuple):
    """Of a layer. on_branch: how many of them run beside the others."""

    total: int
    on_branch: int
    by_name: Counter[str]

    @property
    def on_critical_path(self) -> int:
        return self.total - self.on_branch


class Watch(TorchDispatchMode):
    """Notes every op that launches, and every tensor that is made elsewhere than on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: Counter[str] = Counter()
        self.on_branch: Counter[str] = Counter()
        self.elsewhere: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        name: str = function._schema.name
        if name.removeprefix("aten::") not in _FREE:
            self.launched[name] += 1
            self.on_branch[name] += is_on_branch()
        for tensor in out if isinstance(out, list | tuple) else (out,):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta" and tensor.dim() > 0:
                self.elsewhere.append(f"{function} made {tuple(tensor.shape)} on {tensor.device}")
        return out


class FakeSites:
    """A table of low-rank parts, none of which is there."""

    def open(self, site: LoraSite) -> SiteAdapters:
        table = torch.empty(SLOTS + 1, len(site.widths), TABLE_FIELDS, dtype=torch.int64, device=META)
        return SiteAdapters({}, table, torch.empty(len(site.widths) + 1, dtype=torch.int32, device=META))

    def bind(
        self,
        module: str,
        sites: Sequence[tuple[LoraSite, Split]],
        dtype: torch.dtype,
        rows: Callable[[], Tensor] | None = None,
    ) -> None: ...


def fake_stacks(layer: int, gate_up: Tensor, down: Tensor, num_shared: int) -> Stacks:
    base = len(gate_up) + num_shared
    room = base + SLOTS * 8
    expert_map = torch.empty(SLOTS + 1, base, dtype=torch.int32, device=META)
    return Stacks(*(it.new_empty(room, *it.shape[1:], device=META) for it in (gate_up, down)), expert_map)


def step_of(model: Any, shape: ShapeKey) -> tuple[Callable[[], Tensor], Injected]:
    """A decode of `ROWS` rows with adapters of this shape, whose logits it returns, and what was put into the model."""
    pin_rope(model, model.config, model.config.max_position_embeddings)
    step = CurrentStep()
    probed = probe(model, model.config.max_position_embeddings)
    with torch.inference_mode():  # what it finds by trying needs numbers
        injected = inject(Build(model, probed, step, [LoraOps(FakeSites(), step)], fake_stacks, product_of))
    model.to(META)
    memory = WholeKVMemory(32, 16, torch.bfloat16, META)
    with everywhere(), META:
        for layer in injected.layers:
            layer.allocate(memory.tensor)
        inputs = DeviceInputs(Capacity(ROWS, ROWS, BLOCKS, slices=MOST_SLICES), META)
        views = inputs.views(Sizes(ROWS, ROWS, ROWS, max_query_len=1), shape, at_all_sites=True)
    return lambda: Model(model, step)(views), injected


def count_step(config: Any, shape: ShapeKey) -> Watch:
    """What a decode of a model with this configuration launches."""
    list_unlisted()
    model = AutoModelForCausalLM.from_config(config, attn_implementation=PROBE, dtype=torch.bfloat16).eval()
    compute, _ = step_of(model, shape)
    # not in inference mode, so that composite ops are seen in their parts
    with everywhere(), traced(), torch.no_grad(), META, Watch() as watch:
        compute()
    return watch


def count_layer(config: Any, shape: ShapeKey) -> Launches:
    """Of the last layer, in a decode with adapters of this shape (BASE, LORA, ...).

    config: a Transformers configuration of any size, with a layer at least; layers that follow are like its last.
    """
    few, more = count_step(config, shape), count_step(_with_one_more(config), shape)
    by_name, on_branch = more.launched - few.launched, more.on_branch - few.on_branch
    return Launches(by_name.total(), on_branch.total(), by_name)


def _with_one_more(config: Any) -> Any:
    said = config.to_dict()
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(kinds := said.get(name), list):
            said[name] = [*kinds, kinds[-1]]
    said["num_hidden_layers"] += 1
    return type(config).from_dict(said)


_SMALL = dict(hidden_size=64, vocab_size=128, num_hidden_layers=2, num_attention_heads=4)
# of the structure of Llama-3.1-8B, of Qwen3-8B and of DeepSeek-V2-Lite
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", dict(intermediate_size=96, num_key_value_heads=2, head_dim=16)),
    "qwen3": ("qwen3", dict(intermediate_size=96, num_key_value_heads=2, head_dim=16)),
    "deepseek_v2": ("deepseek_v2", dict(
        intermediate_size=96, moe_intermediate_size=32, n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=2,
        kv_lora_rank=32, q_lora_rank=None, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
        num_key_value_heads=4, first_k_dense_replace=1, topk_method="greedy", n_group=1, topk_group=1)),
}  # fmt: skip
KINDS = {"llama": (BASE, LORA), "qwen3": (BASE, LORA), "deepseek_v2": (BASE, ESFT, LORA, EVERYTHING)}


def config_of(name: str) -> Any:
    model_type, settings = MODELS[name]
    return CONFIG_MAPPING[model_type](**_SMALL | settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(MODELS))
    options = parser.parse_args()
    print("| model | adapters | launches a layer | on the critical path | which |", "|---|---|---:|---:|---|", sep="\n")
    for name in options.models or MODELS:
        for shape in KINDS[name]:
            it = count_layer(config_of(name), shape)
            kinds = ", ".join(f"{kind} {size}" for kind, size in shape._asdict().items() if size) or "none"
            which = ", ".join(f"{count} {op}" for op, count in sorted(it.by_name.items()))
            print(f"| {name} | {kinds} | {it.total} | {it.on_critical_path} | {which} |")


if __name__ == "__main__":
    main()
