"""Routed experts, with the router beside them: over stacks that have room for adapters' experts."""

import torch
from torch import nn

from server.model.build import Build, Injected, Target
from server.model.expert_blocks import OwnBlock, own_block_of
from server.model.experts import ExpertSpec, FoundExperts, RoutedExperts, experts_of
from server.model.families import Foreign, UnsupportedModelError
from server.model.linears import AdaptedLinear
from server.model.routers import OwnRouter, Router, Rule, is_router, logits_product, rule_of, top_k_of


def inject_experts(build: Build, injected: Injected) -> None:
    for name, module in list(build.model.named_modules()):
        if (found := experts_of(name, module)) is not None:
            _replace(build, injected, found, _replace_router(build, injected, found.spec))
        elif (own := own_block_of(name, module)) is not None:
            _replace_block(build, injected, name, module, own)


def _replace_block(build: Build, injected: Injected, name: str, block: Foreign, own: OwnBlock) -> None:
    router = _of_ours(build, injected, f"{name}.router", block.router, own.rule)
    _replace(build, injected, own.found, router)
    block.forward = own.make_forward(block)


def _replace(build: Build, injected: Injected, found: FoundExperts, router: Router | OwnRouter) -> None:
    spec = found.spec
    stacks = build.make_stacks(spec.layer, *found.take())
    ops = [ops.at_experts(spec, found.dtype) for ops in build.site_ops]
    routed = RoutedExperts(found, router, stacks, ops, build.step)
    if stacks.gate_up.is_cuda:  # the next layer's stacks take their pages from the driver, not from what torch keeps
        torch.cuda.empty_cache()
    build.replace(spec.name, routed)
    injected.experts.append(routed)


def _replace_router(build: Build, injected: Injected, spec: ExpertSpec) -> Router | OwnRouter:
    path = spec.name.rpartition(".")[0]
    block: Foreign = build.model.get_submodule(path)
    found = [(leaf, child) for leaf, child in block.named_children() if is_router(child)]
    if len(found) != 1:
        raise UnsupportedModelError(f"{spec.name}: no router of a known kind stands beside these experts")
    leaf, original = found[0]
    rule = rule_of(original, block, spec.num_experts)
    if rule is None:
        return _as_it_is(original, block, spec)
    return _of_ours(build, injected, f"{path}.{leaf}", original, rule)


def _of_ours(build: Build, injected: Injected, path: str, original: nn.Module, rule: Rule) -> Router:
    name = f"{path}.{rule.linear}".rstrip(".")
    product = logits_product(original.get_submodule(rule.linear))
    ops = [ops.at_linears([name], product, is_lm_head=False) for ops in build.site_ops]
    injected.targets.append(Target(name, (sum(product.widths), product.in_features)))
    injected.bypassed.add(name)
    router = Router(rule, AdaptedLinear(product, ops))
    build.replace(path, router)
    return router


def _as_it_is(original: Foreign, block: nn.Module, spec: ExpertSpec) -> OwnRouter:
    top_k = top_k_of(original, block, spec.hidden_size)
    if top_k is None:
        raise UnsupportedModelError(
            f"{spec.name}: the {type(original).__name__} beside them does not return weights and distinct choices"
        )
    router = OwnRouter(original, spec.num_experts, top_k)
    original.forward = router
    return router
