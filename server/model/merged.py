"""The model with an adapter merged into its weights, for the length of a pass: what serving is compared with.

Where the adapter acts, what the base's module computed is replaced by a product with the merged matrix, which is made a
block of rows at a time, in float32, and thrown away. There is no second copy of the base, and none of its weights is
written. Modules are hooked only while such a pass runs: every other step goes through nothing of this, and captured
graphs replay what they were captured with.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.gated.reference import gated
from kernels.grouped_gemm import reference
from server.model.experts import RoutedExperts
from server.model.families import Foreign
from server.model.linears import AdaptedLinear, LinearSlice
from server.model.mla import AbsorbedProjection, LatentLayer
from server.model.routers import Router

# (rows [begin, begin + n) of the base's matrix [n, in] float32, begin) -> the same rows with the adapter merged
MergedRows = Callable[[Tensor, int], Tensor]
_BLOCK_ELEMENTS = 1 << 24  # of a merged matrix at a time: 64 MiB


class MergedExperts(Protocol):
    """Of one layer, whose matrices are [out, in] here however they are stored. Shared experts are numbered behind the
    routed."""

    def replaces(self, expert: int) -> bool: ...

    def gate_up(self, expert: int) -> MergedRows: ...

    def down(self, expert: int) -> MergedRows: ...


class MergedAdapter(Protocol):
    """Implemented in server/weights/merged.py."""

    @property
    def linears(self) -> Collection[str]:
        """Those that it acts on, routers among them, by module name."""

    def linear(self, name: str) -> MergedRows: ...

    def acts_on_experts(self, layer: int, name: str) -> bool: ...

    def experts(self, layer: int, name: str) -> MergedExperts: ...


@contextmanager
def merged_into(model: nn.Module, experts: Sequence[RoutedExperts], adapter: MergedAdapter) -> Iterator[None]:
    """The injected model computes rows of the base as if the adapter were merged into its weights."""
    with ExitStack() as undo:
        for routed in experts:
            undo.callback(setattr, routed, "asks_shared_layer", routed.asks_shared_layer)
            routed.asks_shared_layer = True
        for name in adapter.linears:
            _merge_linear(model, name, adapter, undo)
        for routed in experts:
            if adapter.acts_on_experts(routed.spec.layer, routed.spec.name):
                hook = routed.register_forward_hook(partial(_expert_products, adapter))
                undo.callback(hook.remove)
        yield


def _merge_linear(model: nn.Module, name: str, adapter: MergedAdapter, undo: ExitStack) -> None:
    parent: Foreign = model.get_submodule(name.rpartition(".")[0])
    layer = getattr(parent, "cached_layer", None)
    if isinstance(layer, LatentLayer) and name.endswith(".kv_b_proj"):
        undo.callback(setattr, layer, "projection", layer.projection)
        layer.projection = _MergedProjection(parent, adapter, name)
        return
    module = model.get_submodule(name)
    if isinstance(module, Router):
        undo.callback(setattr, module, "may_hand_input", module.may_hand_input)
        module.may_hand_input = False
    adapted, index = _place_of(module)
    undo.callback(adapted.register_forward_hook(partial(_linear_product, adapter, name, index)).remove)


def _place_of(module: nn.Module) -> tuple[AdaptedLinear, int]:
    """Where a linear of the base is computed now, and which slice of that is its own."""
    match module:
        case AdaptedLinear():
            return module, 0
        case LinearSlice():
            return module.fused, module.index
        case Router():
            return module.logits, 0
    raise AssertionError(f"adapters do not act on {type(module).__name__}")


def _linear_product(
    adapter: MergedAdapter, name: str, index: int, adapted: AdaptedLinear, inputs: tuple[Tensor], y: Tensor
) -> None:
    """y [.., sum of widths]: the linear's own columns are overwritten."""
    it = adapted.product
    start = sum(it.widths[:index])
    columns = slice(start, start + it.widths[index])
    bias = None if it.bias is None else it.bias[columns]
    y[..., columns] = _product(inputs[0], it.rows(index), bias, adapter.linear(name))


def _product(x: Tensor, base: Tensor, bias: Tensor | None, merge: MergedRows) -> Tensor:
    """x [.., in], base [out, in] -> [.., out] float32."""
    x = x.float()
    count = max(1, _BLOCK_ELEMENTS // base.shape[1])
    blocks = [F.linear(x, merge(base[begin : begin + count].float(), begin)) for begin in range(0, len(base), count)]
    y = torch.cat(blocks, dim=-1)
    return y if bias is None else y + bias.float()


class _MergedProjection(AbsorbedProjection):
    """Both sides of kv_b_proj, from one merged matrix."""

    def __init__(self, attention: Foreign, adapter: MergedAdapter, name: str) -> None:
        super().__init__(attention)
        self._adapter, self._name = adapter, name

    def rows(self) -> Tensor:
        return self._adapter.linear(self._name)(super().rows().float(), 0)

    def queries_in(self, query: Tensor) -> Tensor:
        return super().queries_in(query.float()).to(query.dtype)

    def values_out(self, context: Tensor) -> Tensor:
        return super().values_out(context.float()).to(context.dtype)

    def queries_into(self, query: Tensor, taken_in: Tensor) -> None:
        taken_in.copy_(self.queries_in(query))

    def values_into(self, context: Tensor, out: Tensor) -> None:
        out.copy_(self.values_out(context))


def _expert_products(adapter: MergedAdapter, it: RoutedExperts, inputs: tuple[Tensor, Tensor, Tensor], out: Tensor
                     ) -> Tensor:  # fmt: skip
    """All experts of a layer, one after another. inputs: hidden [T, H] and what the router hands on, as
    RoutedExperts."""
    hidden, handed = inputs[0].float(), inputs[1]
    merged = adapter.experts(it.spec.layer, it.spec.name)
    routed = it.route(handed)
    pairs = routed.places.flatten()  # the base's rows: places are expert ids
    choices = routed.places.shape[1]
    products = hidden.new_empty(len(pairs), 2 * it.spec.intermediate_size)
    rows = hidden.new_empty(len(pairs), it.spec.hidden_size)
    chosen = pairs.unique().tolist()
    for expert in chosen:
        own = (pairs == expert).nonzero()[:, 0]
        products[own] = _product(hidden[own // choices], _matrix(it, it.stacks.gate_up, expert),
                                 _row(it.gate_up_bias, expert), merged.gate_up(expert))  # fmt: skip
    h = reference.activate(products, it.activation, it.spec.interleaved, routed, products.dtype)
    for expert in chosen:
        own = (pairs == expert).nonzero()[:, 0]
        base, bias = _matrix(it, it.stacks.down, expert), _row(it.down_bias, expert)
        rows[own] = _product(h[own], base, bias, merged.down(expert))
    total = (rows.view(*routed.places.shape, -1) * routed.weights[..., None]).sum(dim=1)
    if it.shared is not None:
        total += _shared_experts(it, merged, inputs[0])
    return total.to(out.dtype)


def _shared_experts(it: RoutedExperts, merged: MergedExperts, hidden: Tensor) -> Tensor:
    """Where they are the base's, its layer computes them, with what is merged into its linears."""
    assert it.shared is not None
    first, width, inner = it.spec.num_experts, it.spec.hidden_size, it.spec.intermediate_size
    if not merged.replaces(first):
        return it.shared.layer(hidden).float()
    total = torch.zeros_like(hidden, dtype=torch.float32)
    nothing = total.new_zeros(1)  # of the base's: it may not even be in the stack
    for expert in range(first, first + it.shared.num):
        gate_up = _product(hidden, nothing.expand(2 * inner, width), None, merged.gate_up(expert))
        h = gated(gate_up, it.activation, it.spec.interleaved)
        total += _product(h, nothing.expand(width, inner), None, merged.down(expert))
    return total


def _matrix(it: RoutedExperts, stack: Tensor, expert: int) -> Tensor:
    """[out, in]"""
    return stack[expert].T if it.spec.transposed else stack[expert]


def _row(bias: Tensor | None, expert: int) -> Tensor | None:
    return None if bias is None else bias[expert]
