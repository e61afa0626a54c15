"""Linears that adapters may act on: those that read the same input become one product."""

from collections import Counter
from itertools import chain

from server.model.build import Build, Injected, Target
from server.model.linears import AdaptedLinear, LinearSlice, SharedInput
from server.model.product import Product, is_linear


def inject_linears(build: Build, injected: Injected) -> None:
    empty = {name for name, module in build.model.named_modules() if is_linear(module) and not module.weight.numel()}
    for names in _groups(build.probed.siblings, injected.bypassed | empty):
        if names:
            product = _replace(build, names)
            widths = zip(names, product.widths, strict=True)
            injected.targets += [Target(name, (width, product.in_features)) for name, width in widths]


def _groups(siblings: list[list[str]], bypassed: set[str]) -> list[list[str]]:
    """A linear that reads several inputs in turn is nobody's sibling."""
    times = Counter(chain.from_iterable(siblings))
    together = [[name for name in names if times[name] == 1 and name not in bypassed] for names in siblings]
    return together + [[name] for name, count in times.items() if count > 1 and name not in bypassed]


def _replace(build: Build, names: list[str]) -> Product:
    product = build.make_product([build.model.get_submodule(name) for name in names])
    is_lm_head = names[0] == "lm_head"  # logits are computed for sampled rows only
    ops = [ops.at_linears(names, product, is_lm_head) for ops in build.site_ops]
    adapted = AdaptedLinear(product, ops, build.branch)
    if len(names) == 1:
        build.replace(names[0], adapted)
        return product
    shared = SharedInput(adapted)
    for index, name in enumerate(names):
        build.replace(name, LinearSlice(adapted, shared, index))
    return product
