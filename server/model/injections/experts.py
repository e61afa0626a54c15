"""Routed experts, with the router beside them: over stacks that have room for adapters' experts."""

import torch
from torch import nn

from kernels.compiled import takes_on
from server.model.branch import Branch
from server.model.build import Build, Injected, Target
from server.model.expert_blocks import OwnBlock, PlainBlock, own_block_of
from server.model.experts import ExpertSpec, FoundExperts, RoutedExperts, Stacks, experts_of
from server.model.families import Foreign, UnsupportedModelError
from server.model.linears import AdaptedLinear, LinearSlice, SharedInput
from server.model.product import Product
from server.model.routers import OwnRouter, Router, Rule, is_router, logits_product, rule_of, top_k_of
from server.model.shared_experts import (
    LINEARS,
    FoundShared,
    PlacedDown,
    PlacedGateUp,
    SharedExperts,
    fill,
    shared_experts_of,
)


def inject_experts(build: Build, injected: Injected) -> None:
    for name, module in list(build.model.named_modules()):
        if (found := experts_of(name, module)) is not None:
            _replace_experts(build, injected, found)
        elif (own := own_block_of(name, module)) is not None:
            _replace_block(build, injected, name, module, own)


def _replace_block(build: Build, injected: Injected, name: str, block: Foreign, own: OwnBlock) -> None:
    router = _of_ours(build, injected, f"{name}.router", block.router, own.rule, not own.reads_logits, 0)
    _replace(build, injected, own.found, router)
    block.forward = own.make_forward(block)


def _replace_experts(build: Build, injected: Injected, found: FoundExperts) -> None:
    spec = found.spec
    path, _, leaf = spec.name.rpartition(".")
    block: Foreign = build.model.get_submodule(path)
    router_leaf, original = _router_beside(block, spec)
    rule = rule_of(original, block, spec.num_experts)
    if rule is None:
        _replace(build, injected, found, _as_it_is(original, block, spec))
        return
    is_plain = not (spec.transposed or spec.interleaved or spec.biased)
    shared = is_plain and shared_experts_of(block, router_leaf, leaf, spec.intermediate_size, found.activation) or None
    num_shared = shared.num if shared else 0
    router = _of_ours(build, injected, f"{path}.{router_leaf}", original, rule, True, num_shared)
    _replace(build, injected, found._replace(spec=spec._replace(num_shared=num_shared)), router, shared)
    if shared:
        block.forward = PlainBlock(block, router_leaf, leaf)


def _replace(
    build: Build, injected: Injected, found: FoundExperts, router: Router | OwnRouter, shared: FoundShared | None = None
) -> None:
    spec = found.spec
    stacks = build.make_stacks(spec.layer, *found.take(), spec.num_shared)
    ops = [ops.at_experts(spec, found.dtype) for ops in build.site_ops]
    its = None if shared is None else _shared_experts(build, injected, spec, stacks, shared)
    routed = RoutedExperts(found, router, stacks, ops, build.step, its)
    if stacks.gate_up.is_cuda:  # the next layer's stacks take their pages from the driver, not from what torch keeps
        torch.cuda.empty_cache()
    build.replace(spec.name, routed)
    injected.experts.append(routed)


def _shared_experts(
    build: Build, injected: Injected, spec: ExpertSpec, stacks: Stacks, shared: FoundShared
) -> SharedExperts:
    """Where kernels compute, their weights are those in the stack; else the layer keeps its own."""
    path = f"{spec.name.rpartition('.')[0]}.{shared.leaf}"
    layer: Foreign = build.model.get_submodule(path)
    device = stacks.gate_up.device
    if device.type == "cpu" and not takes_on(device):
        return SharedExperts(shared.num, layer, are_in_stack=False)
    places = slice(spec.num_experts, spec.num_experts + shared.num)
    gate_up, down = stacks.gate_up[places], stacks.down[places]
    fill(gate_up, down, layer)
    names = [f"{path}.{linear}" for linear in LINEARS]
    joint = _adapted(build, injected, names[:2], PlacedGateUp(gate_up), build.branch)
    halves = SharedInput(joint)
    for index, name in enumerate(names[:2]):
        build.replace(name, LinearSlice(joint, halves, index))
    build.replace(names[2], _adapted(build, injected, names[2:], PlacedDown(down), build.branch))
    return SharedExperts(shared.num, layer, are_in_stack=True)


def _adapted(
    build: Build, injected: Injected, names: list[str], product: Product, branch: Branch | None = None
) -> AdaptedLinear:
    """Of linears that are not looked for any more. branch: as in AdaptedLinear."""
    widths = zip(names, product.widths, strict=True)
    injected.targets += [Target(name, (width, product.in_features)) for name, width in widths]
    injected.bypassed.update(names)
    return AdaptedLinear(product, [ops.at_linears(names, product, is_lm_head=False) for ops in build.site_ops], branch)


def _router_beside(block: nn.Module, spec: ExpertSpec) -> tuple[str, nn.Module]:
    found = [(leaf, child) for leaf, child in block.named_children() if is_router(child)]
    if len(found) != 1:
        raise UnsupportedModelError(f"{spec.name}: no router of a known kind stands beside these experts")
    return found[0]


def _of_ours(
    build: Build, injected: Injected, path: str, original: nn.Module, rule: Rule, may_hand_input: bool, num_shared: int
) -> Router:
    name = f"{path}.{rule.linear}".rstrip(".")
    linear: Foreign = original.get_submodule(rule.linear)
    stored = linear.weight.dtype
    logits = _adapted(build, injected, [name], logits_product(linear))
    router = Router(rule, logits, stored, build.step, may_hand_input, num_shared)
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
