"""Routed experts, with the router beside them: over stacks that have room for adapters' experts."""

import torch
from torch import nn

from server.model.build import Build, Injected
from server.model.experts import RoutedExperts, layer_of
from server.model.families import Foreign, UnsupportedModelError
from server.model.routers import RULES, Router


def inject_experts(build: Build, injected: Injected) -> None:
    for name, module in list(build.model.named_modules()):
        if _is_experts(module):
            injected.experts.append(_replace(build, name, module))


def _is_experts(module: nn.Module) -> bool:
    """One of Transformers' modules that hold all experts of a layer in two tensors."""
    return hasattr(module, "gate_up_proj") and hasattr(module, "_apply_gate")


def _replace(build: Build, name: str, experts: Foreign) -> RoutedExperts:
    router = _replace_router(build, name)
    layer = layer_of(name)
    stacks = build.make_stacks(layer, experts.gate_up_proj.data, experts.down_proj.data)
    routed = RoutedExperts(experts, router, stacks, layer, build.step)
    was_cuda = experts.gate_up_proj.is_cuda
    experts.gate_up_proj = experts.down_proj = None  # the stacks hold them now
    if was_cuda:  # the next layer's stacks take their pages from the driver, not from what torch keeps
        torch.cuda.empty_cache()
    build.replace(name, routed)
    return routed


def _replace_router(build: Build, experts: str) -> Router:
    block = experts.rpartition(".")[0]
    children = build.model.get_submodule(block).named_children()
    found = [(leaf, child) for leaf, child in children if type(child).__name__ in RULES]
    if len(found) != 1:
        raise UnsupportedModelError(f"{experts}: no router of a known kind stands beside these experts")
    leaf, original = found[0]
    router = Router(original)
    build.replace(f"{block}.{leaf}", router)
    return router
