"""Routed experts, with the router beside them: over stacks that have room for adapters' experts."""

import torch
from torch import nn

from server.model.build import Build, Injected, Target
from server.model.experts import RoutedExperts, spec_of
from server.model.families import Foreign, UnsupportedModelError
from server.model.linears import AdaptedLinear
from server.model.routers import RULES, Router, logits_product


def inject_experts(build: Build, injected: Injected) -> None:
    for name, module in list(build.model.named_modules()):
        if _is_experts(module):
            _replace(build, injected, name, module)


def _is_experts(module: nn.Module) -> bool:
    """One of Transformers' modules that hold all experts of a layer in two tensors."""
    return hasattr(module, "gate_up_proj") and hasattr(module, "_apply_gate")


def _replace(build: Build, injected: Injected, name: str, experts: Foreign) -> None:
    router = _replace_router(build, injected, name)
    spec, dtype = spec_of(name, experts), experts.down_proj.dtype
    stacks = build.make_stacks(spec.layer, experts.gate_up_proj.data, experts.down_proj.data)
    ops = [ops.at_experts(spec, dtype) for ops in build.site_ops]
    routed = RoutedExperts(experts, spec, router, stacks, ops, build.step)
    was_cuda = experts.gate_up_proj.is_cuda
    experts.gate_up_proj = experts.down_proj = None  # the stacks hold them now
    if was_cuda:  # the next layer's stacks take their pages from the driver, not from what torch keeps
        torch.cuda.empty_cache()
    build.replace(name, routed)
    injected.experts.append(routed)


def _replace_router(build: Build, injected: Injected, experts: str) -> Router:
    block = experts.rpartition(".")[0]
    children = build.model.get_submodule(block).named_children()
    found = [(leaf, child) for leaf, child in children if type(child).__name__ in RULES]
    if len(found) != 1:
        raise UnsupportedModelError(f"{experts}: no router of a known kind stands beside these experts")
    leaf, original = found[0]
    name, product = f"{block}.{leaf}", logits_product(original)
    ops = [ops.at_linears([name], product, is_lm_head=False) for ops in build.site_ops]
    injected.targets.append(Target(name, (sum(product.widths), product.in_features)))
    router = Router(original, AdaptedLinear(product, ops))
    build.replace(name, router)
    return router
