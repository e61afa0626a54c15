"""Load a base model and inject what is ours: attention, experts, LoRA. This file is the list of it."""

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging as transformers_logging

from kernels.lora import LoraSite, SiteAdapters, Split
from server.model.experts import RoutedExperts, Stacks
from server.model.families import UnsupportedModelError, check_family
from server.model.fused_ops import RmsNorm, fuse_rope, is_rms_norm
from server.model.inputs import CurrentStep
from server.model.lora_linear import LinearSlice, LoraLinear, SharedInput
from server.model.mla import AbsorbedProjection, is_latent, keep_latents
from server.model.probe import PROBE, Probed
from server.model.routers import RULES, Router

OnProgress = Callable[[str, int, int], None]  # stage, done, total
# (layer, gate_up, down) of the base -> stacks that begin with the same experts and have room for adapters'
MakeStacks = Callable[[int, Tensor, Tensor], Stacks]


@dataclass(frozen=True)
class Target:
    """A linear that LoRA may adapt, by its name in the base. One of absorbed attention acts at two sites."""

    name: str
    shape: tuple[int, int]  # out, in
    sites: list[tuple[LoraSite, SiteAdapters, Split]]


@dataclass
class Injected:
    """What was put into a model."""

    targets: list[Target] = field(default_factory=list)
    experts: list[RoutedExperts] = field(default_factory=list)
    absorbed: dict[nn.Module, AbsorbedProjection] = field(default_factory=dict)  # by attention module


def load_model(
    model_dir: Path, dtype: torch.dtype, on_progress: OnProgress
) -> tuple[nn.Module, GenerationConfig | None]:
    """A Transformers causal LM in eval mode. Raises UnsupportedModelError before reading any weight."""
    if not (model_dir / "config.json").is_file():
        raise UnsupportedModelError(f"{model_dir.name!r} holds no config.json, so it is not a Transformers model")
    config = AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    check_family(config)
    previous = transformers_logging.set_tqdm_hook(_report_bars(on_progress))
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            model_dir,
            config=config,
            dtype=dtype,
            attn_implementation=PROBE,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    finally:
        transformers_logging.set_tqdm_hook(previous)
    _check_coverage(report)
    has_generation = (model_dir / "generation_config.json").is_file()
    generation = GenerationConfig.from_pretrained(model_dir, local_files_only=True) if has_generation else None
    return model.eval(), generation


def _check_coverage(report: dict[str, Any]) -> None:
    """Every parameter comes from the checkpoint: Transformers fills the rest with random numbers and goes on."""
    stray = [key for key in report["unexpected_keys"] if not key.endswith("rotary_emb.inv_freq")]  # old checkpoints
    for what, keys in (("lacks", report["missing_keys"]), ("has in another shape", report["mismatched_keys"]),
                       ("has beyond what the model takes", stray)):  # fmt: skip
        if keys:
            shown = ", ".join(str(key) for key in sorted(keys)[:3])
            raise UnsupportedModelError(f"the checkpoint {what} {len(keys)} tensors: {shown}{', …' * (len(keys) > 3)}")


def _report_bars(on_progress: OnProgress) -> Callable[..., Any]:
    """Turn the progress bar over the weights into messages; any other bar stays silent."""

    def hook(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args:
            return factory(**{**kwargs, "disable": True})
        return _reported(args[0], str(kwargs.get("desc", "Loading")), on_progress)

    return hook


def _reported(items: Collection[Any], stage: str, on_progress: OnProgress) -> Iterator[Any]:
    for done, item in enumerate(items, start=1):
        yield item
        on_progress(stage, done, len(items))


def inject(model: nn.Module, probed: Probed, step: CurrentStep, make_stacks: MakeStacks) -> Injected:
    """Replace experts, routers, norms and linears in place. Caches follow once their size is known."""
    injected = Injected()
    for name, module in list(model.named_modules()):
        if hasattr(module, "gate_up_proj") and hasattr(module, "_apply_gate"):
            _inject_experts(model, name, module, step, make_stacks, injected)
        elif is_rms_norm(module):
            _replace(model, name, RmsNorm(module))
    for attention, _ in probed.attention:
        if is_latent(attention):
            keep_latents(attention)
            injected.absorbed[attention] = AbsorbedProjection(attention)
        fuse_rope(attention)
    for siblings in probed.siblings:
        _inject_linears(model, siblings, step, injected)
    return injected


def _inject_experts(
    model: nn.Module, name: str, experts: nn.Module, step: CurrentStep, make_stacks: MakeStacks, injected: Injected
) -> None:
    block = model.get_submodule(name.rpartition(".")[0])
    found = [(leaf, child) for leaf, child in block.named_children() if type(child).__name__ in RULES]
    if len(found) != 1:
        raise UnsupportedModelError(f"{name}: no router of a known kind stands beside these experts")
    leaf, original = found[0]
    router = Router(original)
    setattr(block, leaf, router)
    layer = layer_of(name)
    stacks = make_stacks(layer, experts.gate_up_proj.data, experts.down_proj.data)
    routed = RoutedExperts(experts, router, stacks, layer, step)
    was_cuda = experts.gate_up_proj.is_cuda
    experts.gate_up_proj = experts.down_proj = None  # the stacks hold them now
    if was_cuda:  # the next layer's stacks take their pages from the driver, not from what torch keeps
        torch.cuda.empty_cache()
    _replace(model, name, routed)
    injected.experts.append(routed)


def _inject_linears(model: nn.Module, names: list[str], step: CurrentStep, injected: Injected) -> None:
    """One linear, or several that read the same input."""
    linears = [model.get_submodule(name) for name in names]
    attention = model.get_submodule(names[0].rpartition(".")[0])
    if attention in injected.absorbed and names[0].endswith("kv_b_proj"):  # never called: attention goes around it
        it = injected.absorbed[attention]
        sites = [
            (it.query_site, it.query_adapters, it.split_for_queries),
            (it.value_site, it.value_adapters, it.split_for_values),
        ]
        injected.targets.append(Target(names[0], (it.out_features, it.latent), sites))
        return
    fused = LoraLinear(linears, names[0] == "lm_head", step)
    shared = SharedInput(fused)
    for index, (name, linear) in enumerate(zip(names, linears, strict=True)):
        _replace(model, name, fused if len(names) == 1 else LinearSlice(fused, shared, index))
        shape = (linear.out_features, linear.in_features)
        injected.targets.append(Target(name, shape, [(fused.site, fused.adapters, _at(index))]))


def _at(index: int) -> Split:
    return lambda weights: [(index, weights)]


def layer_of(name: str) -> int:
    """model.layers.3.mlp.experts -> 3"""
    match = re.search(r"\.layers\.(\d+)\.", f".{name}")
    assert match is not None, name
    return int(match[1])


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
