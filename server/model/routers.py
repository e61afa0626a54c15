"""Routers: where the rule by which experts are chosen is one of ours, the choice is one op with what follows it.

The rule is found by trying: a router's own weights and choices for random tokens, against those of each rule that its
numbers allow. A router whose rule is none of ours stays as it is, and hands its choices on.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from kernels.expert_route import GroupScore, RouterLinear, Routing, Score, multiplies
from kernels.expert_route.reference import choose
from server.model.families import Foreign
from server.model.inputs import CurrentStep
from server.model.likeness import are_alike, numbers, outcome
from server.model.linears import AdaptedLinear
from server.model.product import DenseProduct, is_linear

_TRIED = 512  # tokens: rules of groups agree on most
_SCALES = ("routed_scaling_factor", "router_scaling_factor", "route_scale")
_NOT_CHOSEN = -1e30


@dataclass(frozen=True)
class Rule:
    """How a router chooses, and where its logits come from."""

    routing: Routing
    correction: Tensor | None  # [M]: added to the scores when experts are ranked
    linear: str  # name of the linear inside it that makes its logits; empty: it is one itself


class Choices(NamedTuple):
    """Of a router of Transformers: weights [T, K] and expert ids [T, K]."""

    weights: Tensor
    ids: Tensor


def is_router(module: nn.Module) -> bool:
    """Whether it may be one: what stands beside experts and is neither a linear nor a layer."""
    name = type(module).__name__
    return name.endswith(("Router", "Gate")) and not is_linear(module)


def rule_of(router: Foreign, block: Foreign, num_experts: int) -> Rule | None:
    """The rule of ours that it follows, tried in float32; None: there is none. block: what holds it, and may hand it
    tensors of its own."""
    handed = [it.float() for it in _handed_on(router, block)]
    return rule_of_choices(router, num_experts, lambda wide, x: _choices(wide, x, handed), handed)


@torch.inference_mode()
def rule_of_choices(
    router: Foreign,
    num_experts: int,
    choices_of: Callable[[nn.Module, Tensor], Choices | None],
    handed: Sequence[Tensor] = (),
) -> Rule | None:
    """The same from whatever chooses: choices_of is given the router in float32 and x [T, H]. handed: tensors beside
    the router's own that may correct its scores."""
    linear = _linear_of(router, num_experts)
    if linear is None:
        return None
    wide = copy.deepcopy(router).float()
    weight, bias = _weight_and_bias(wide.get_submodule(linear))
    x = _tokens(weight)
    logits, theirs = nn.functional.linear(x, weight, bias), choices_of(wide, x)
    if theirs is None or _has_ties(logits):
        return None
    corrections = [it.float().reshape(-1) for it in [*router.parameters(), *router.buffers(), *handed]
                   if it.numel() == num_experts and it is not getattr(router, "bias", None)]  # fmt: skip
    for routing, correction in product(_routings(router, theirs.ids.shape[-1]), [*corrections, None]):
        if _same(theirs, Choices(*choose(logits, routing, correction))):
            return Rule(routing, correction, linear)
    return None


def _has_ties(logits: Tensor) -> bool:
    """Whether nearly every token finds experts alike, as where a router was never trained: which ones it takes then is
    its own affair, and any rule would fit."""
    return bool((logits.sort(-1).values.diff(dim=-1) == 0).any(-1).float().mean() > 0.5)


def _tokens(weight: Tensor) -> Tensor:
    """[T, H], for a router's weight [M, H]: logits from nearly alike to apart, and not so far that a sigmoid is one."""
    size = 3.0 / float(weight.norm(dim=1).mean() + 1e-9)
    spread = torch.logspace(-1, 0, _TRIED, device=weight.device)[:, None]
    return numbers(_TRIED, weight.shape[1], device=weight.device) * spread * size


def _routings(router: Foreign, top_k: int) -> Iterator[Routing]:
    """Every rule that its numbers allow; those with groups first, which the others are special cases of."""
    scales = dict.fromkeys([*(float(it) for name in _SCALES if (it := getattr(router, name, None)) is not None), 1.0])
    groups = getattr(router, "num_group", None) or 1
    limits = [(groups, int(router.topk_group), kind) for kind in GroupScore] if groups > 1 else []
    for limit, score, renormalise, scale in product(
        [*limits, (1, 1, GroupScore.MAX)],
        (Score.SOFTMAX_OF_CHOSEN, Score.SOFTMAX, Score.SIGMOID), (False, True), scales,
    ):  # fmt: skip
        yield Routing(top_k, score, renormalise, scale, *limit)


def _linear_of(router: Foreign, num_experts: int) -> str | None:
    """Where its logits are made: its own weight, or the one linear that it has."""
    weight = getattr(router, "weight", None)
    if isinstance(weight, Tensor):
        return "" if weight.dim() == 2 and len(weight) == num_experts else None
    inside = [name for name, child in router.named_children() if is_linear(child) and len(child.weight) == num_experts]
    return inside[0] if len(inside) == 1 else None


def _weight_and_bias(linear: Foreign) -> tuple[Tensor, Tensor | None]:
    return linear.weight, getattr(linear, "bias", None)


def _handed_on(router: Foreign, block: Foreign) -> list[Tensor]:
    """What a block hands its router beside hidden states: tensors of its own, by the names of the parameters."""
    names = [name for name, it in inspect.signature(router.forward).parameters.items()
             if it.kind is it.POSITIONAL_OR_KEYWORD][1:]  # fmt: skip
    return [getattr(block, name) for name in names if isinstance(getattr(block, name, None), Tensor)]


def _choices(router: Foreign, x: Tensor, handed: list[Tensor]) -> Choices | None:
    """Its weights and ids for x [T, H]; some take their tokens as a batch of one."""
    result = outcome(router, x, *handed)
    if result is None:
        result = outcome(router, x[None], *handed)
    return choices_in(result, len(x))


def choices_in(result: object, num_tokens: int) -> Choices | None:
    """Among what a router of Transformers returns: ids, and the last that has their shape: logits come before weights,
    and have it too where every expert is chosen."""
    tensors = [it for it in result if isinstance(it, Tensor)] if isinstance(result, tuple) else []
    ids = [it for it in tensors if not it.is_floating_point()]
    if len(ids) != 1 or ids[0].numel() % num_tokens:
        return None
    weights = [it for it in tensors if it.is_floating_point() and it.shape == ids[0].shape]
    return Choices(weights[-1].reshape(num_tokens, -1), ids[0].reshape(num_tokens, -1)) if weights else None


@torch.inference_mode()
def top_k_of(router: nn.Module, block: Foreign, hidden_size: int) -> int | None:
    """How many experts it gives a token; None: it returns something else than weights and distinct choices."""
    it = next(router.parameters())
    x = numbers(_TRIED, hidden_size, dtype=it.dtype, device=it.device)
    choices = _choices(router, x, _handed_on(router, block))
    if choices is None or any(len(set(ids)) < len(ids) for ids in choices.ids.tolist()):
        return None
    return choices.ids.shape[-1]


def _same(theirs: Choices, ours: Choices) -> bool:
    """In whatever order the choices of a token come."""
    (their_ids, their_order), (our_ids, our_order) = theirs.ids.sort(), ours.ids.sort()
    weights = theirs.weights.gather(1, their_order), ours.weights.gather(1, our_order)
    return torch.equal(their_ids, our_ids) and are_alike(*weights)


def spread(choices: Choices, num_experts: int) -> Tensor:
    """[T, M] float32: the weights of the chosen, and something lower everywhere else."""
    weights = choices.weights.float()
    return weights.new_full((len(weights), num_experts), _NOT_CHOSEN).scatter_(1, choices.ids.long(), weights)


def logits_product(original: Foreign) -> DenseProduct:
    """The router's own product in float32: a choice hangs on the last digits of its logits."""
    weight, bias = _weight_and_bias(original)
    experts, hidden = weight.shape
    linear = skip_init(nn.Linear, hidden, experts, bias=bias is not None, dtype=torch.float32)
    linear.weight = nn.Parameter(weight.data.float(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.data.float(), requires_grad=False)
    return DenseProduct([linear])


class Router(nn.Module):
    """Takes a router's place: hands its logits on, where the original would hand on weights and choices; or its input,
    where the product that makes them is a part of the choice.

    Adapters act on the logits, before the choice. Choosing and rerouting are one op with what follows, in
    RoutedExperts.
    """

    def __init__(
        self, rule: Rule, logits: AdaptedLinear, stored: torch.dtype, step: CurrentStep, may_hand_input: bool,
        num_shared: int,
    ) -> None:  # fmt: skip
        """stored: the type that the model has the weight in. may_hand_input: nobody but the experts reads what is
        handed on. num_shared: experts that every token takes as well."""
        super().__init__()
        self.routing, self.logits, self.may_hand_input = rule.routing, logits, may_hand_input
        self._stored, self._step, self._choices = stored, step, rule.routing.top_k + num_shared
        self.correction: Tensor | None
        # a copy: it was found in inference mode, and such tensors stay what they are
        self.register_buffer("correction", None if rule.correction is None else rule.correction.clone())

    @property
    def weight(self) -> Tensor:
        """[M, H] float32."""
        assert isinstance(self.logits.product, DenseProduct)
        return self.logits.product.weight

    def linear(self, dtype: torch.dtype) -> RouterLinear:
        """For input of this type."""
        return RouterLinear(self.weight, self.logits.product.bias, self._stored is dtype)

    def hands_its_input_on(self, x: Tensor) -> bool:
        """In this step; x: a tensor by token. Where LoRA may act on logits, they are made before."""
        return self.may_hand_input and multiplies(x, self._choices) and not self._step.inputs.rows.shape.rank

    def forward(self, hidden: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [.., H] -> logits [T, M] float32, or [T, H] as it is; thrice: a block passes on what it takes for
        weights and ids."""
        x = hidden.reshape(-1, hidden.shape[-1])
        handed = x if self.hands_its_input_on(x) else self.logits(x.float())
        return handed, handed, handed


class OwnRouter:
    """Takes the place of the forward of a router whose rule is none of ours: hands on what it chose, as if that were
    logits. The router stays where it is, with its linears."""

    correction = None

    def __init__(self, original: nn.Module, num_experts: int, top_k: int) -> None:
        self._forward, self._num_experts = original.forward, num_experts
        self.routing = Routing(top_k, Score.GIVEN)

    def __call__(self, hidden: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [.., H] -> [T, M] float32, thrice (see Router and Score.GIVEN)."""
        choices = choices_in(self._forward(hidden, *others), hidden.numel() // hidden.shape[-1])
        assert choices is not None
        given = spread(choices, self._num_experts)
        return given, given, given
