"""Mixtures that Transformers computes in a way of its own, where others hand choices to a module of experts.

Llama 4's block lets every expert compute every token, most of them times nought. DBRX's chooses by itself, and its
experts' matrices lie one below the other. What a block does is told by trying its own forward with stand-ins for its
parts, so that nothing large is multiplied.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels.expert_route import Routing, Score
from kernels.gated import Activation
from server.model.activations import candidates, same_as
from server.model.experts import ExpertSpec, FoundExperts, take_matrices
from server.model.families import Foreign, UnsupportedModelError
from server.model.likeness import Says, are_alike, numbers, outcome, stand_in
from server.model.routers import Choices, Rule, rule_of_choices

_TOKENS = 5  # that blocks are tried with


class OwnBlock(NamedTuple):
    """A block whose forward is ours, once its experts and its router are: make_forward is given the block then.

    reads_logits: that forward does, beside the experts.
    """

    found: FoundExperts
    rule: Rule
    make_forward: Callable[[nn.Module], Callable[[Tensor], object]]
    reads_logits: bool = False


def own_block_of(name: str, block: Foreign) -> OwnBlock | None:
    """Of the module of this name. None: it is no such block. Raises UnsupportedModelError for one that computes what
    ours does not."""
    if not all(isinstance(getattr(block, part, None), nn.Module) for part in ("router", "experts")):
        return None
    for activation_of, make in ((_dense_activation, _dense_block), (_flat_activation, _flat_block)):
        if (activation := activation_of(block.experts)) is not None:
            return make(f"{name}.experts", block.experts, block, activation)
    return None


# -- every expert computes every token (Llama 4) --------------------------------------------------------------------


@torch.inference_mode()
def _dense_activation(experts: Foreign) -> Activation | None:
    """Of experts [M, H, 2I] and [M, I, H], gate beside up, which are given the tokens of each in turn."""
    if not (hasattr(experts, "gate_up_proj") and hasattr(experts, "down_proj")) or hasattr(experts, "_apply_gate"):
        return None

    def activated(products: Tensor) -> Tensor:
        """[T, 2I] -> [T, I], a token an expert, each with a factor of its own that must fit."""
        count, width = products.shape
        factors = _factors(count)[:, None]
        gate_up = torch.eye(width) * factors[:, None]
        down = torch.eye(width)[: width // 2].expand(count, -1, -1)
        small = stand_in(experts, {}, gate_up_proj=gate_up, down_proj=down, num_experts=count, hidden_size=width,
                         intermediate_size=width // 2, expert_dim=width // 2)  # fmt: skip
        rows: Tensor = type(experts).forward(small, products / factors)
        return rows[:, : width // 2]

    return same_as(activated, candidates(experts), is_interleaved=False)


def _dense_block(name: str, experts: Foreign, block: Foreign, activation: Activation) -> OwnBlock:
    num_experts, inner, hidden = experts.down_proj.shape
    choices = getattr(block, "top_k", None)
    if choices != 1:
        raise UnsupportedModelError(
            f"{name}: a token takes {choices} experts, each of which reads it times its own score; one is served"
        )
    if not _scales_its_input(block, num_experts):
        raise UnsupportedModelError(f"{name}: the {type(block).__name__} around these experts is not known")
    spec = ExpertSpec(num_experts, hidden, inner, name, transposed=True, interleaved=False, biased=False)
    found = FoundExperts(spec, activation, experts.down_proj.dtype, lambda: take_matrices(experts))
    # the softmax of one logit is one: its score is in what the expert reads
    return OwnBlock(found, Rule(Routing(1, Score.SOFTMAX_OF_CHOSEN), None, ""), ScaledInput, reads_logits=True)


@torch.inference_mode()
def _scales_its_input(block: Foreign, num_experts: int) -> bool:
    """Whether out = expert(sigmoid(its logit) * x) + shared(x), tried with experts that cube."""
    x, logits, factors = numbers(_TOKENS, block.hidden_dim), numbers(_TOKENS, num_experts), _factors(num_experts)

    def route(_: Tensor) -> object:
        router = stand_in(block.router, {}, weight=logits.T, bias=None)
        return type(block.router).forward(router, torch.eye(_TOKENS))

    def cubes(rows: Tensor) -> Tensor:
        return (rows.view(num_experts, -1) ** 3 * factors[:, None]).view(rows.shape)

    tried = stand_in(block, {"router": Says(route), "experts": Says(cubes), "shared_expert": Says(lambda it: it / 2)})
    theirs = outcome(type(block).forward, tried, x[None])
    score, chosen = logits.max(-1)
    ours = (x * score.sigmoid()[:, None]) ** 3 * factors[chosen][:, None] + x / 2
    return isinstance(theirs, tuple) and are_alike(theirs[0], ours)


class ScaledInput:
    """Takes the place of the forward of a block whose expert reads a token times the score that it was chosen with."""

    def __init__(self, block: Foreign) -> None:
        self._block = block

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        it, x = self._block, hidden.reshape(-1, hidden.shape[-1])
        logits, *_ = it.router(x)
        score = logits.amax(-1, keepdim=True).sigmoid().to(x.dtype)
        return it.experts(x * score, logits, logits) + it.shared_expert(x), logits


# -- matrices one below the other, and a block that chooses (DBRX) --------------------------------------------------


@torch.inference_mode()
def _flat_activation(experts: Foreign) -> Activation | None:
    """Of experts with w1, v1 and w2 [M * I, H] in a part of theirs: gate, up and down, the last as [in, out]."""
    held: Foreign = getattr(experts, "mlp", None)
    if not all(hasattr(held, matrix) for matrix in ("w1", "v1", "w2")):
        return None

    def activated(products: Tensor) -> Tensor:
        """As _dense_activation's."""
        count, width = products.shape
        factors = _factors(count)[:, None]
        gate, up = ((it * factors[:, None]).flatten(0, 1) for it in torch.eye(width).chunk(2))
        down = torch.eye(width)[: width // 2].repeat(count, 1)
        sizes = dict(hidden_size=width, ffn_hidden_size=width // 2)
        small = stand_in(held, {}, w1=gate, v1=up, w2=down, moe_num_experts=count, **sizes)
        tried = stand_in(experts, {"mlp": small}, num_experts=count, **sizes)
        ids = torch.arange(count)[:, None]
        rows: Tensor = type(experts).forward(tried, (products / factors)[None], ids, torch.ones(count, 1))
        return rows[0, :, : width // 2]

    return same_as(activated, candidates(held), is_interleaved=False)


def _flat_block(name: str, experts: Foreign, block: Foreign, activation: Activation) -> OwnBlock:
    held, num_experts, inner = experts.mlp, experts.num_experts, experts.ffn_hidden_size
    hidden = held.w1.shape[1]
    rule = rule_of_choices(block.router, num_experts, lambda router, x: _choices_of(block, router, x))
    if rule is None:
        raise UnsupportedModelError(f"{name}: the {type(block).__name__} around them chooses in an unknown way")
    spec = ExpertSpec(num_experts, hidden, inner, name, transposed=False, interleaved=False, biased=False)

    def take() -> tuple[Tensor, Tensor]:
        gate, up, down = (getattr(held, matrix).data.view(num_experts, inner, hidden) for matrix in ("w1", "v1", "w2"))
        held.w1 = held.v1 = held.w2 = None
        return torch.cat([gate, up], dim=1), down.transpose(1, 2)

    return OwnBlock(FoundExperts(spec, activation, held.w1.dtype, take), rule, PlainBlock)


def _choices_of(block: Foreign, router: nn.Module, x: Tensor) -> Choices | None:
    """What a block hands its experts for x [T, H] with this router. None: it does more than to return what they say."""
    handed: list[Choices] = []

    def experts(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        handed.append(Choices(weights, ids))
        return hidden**3

    tried = stand_in(block, {"router": router, "experts": Says(experts)})
    result = outcome(type(block).forward, tried, x[None])
    return handed[0] if handed and are_alike(result, x[None] ** 3) else None


class PlainBlock:
    """Takes the place of the forward of a block that is its experts and nothing beside (shared ones are among them)."""

    def __init__(self, block: Foreign, router: str = "router", experts: str = "experts") -> None:
        self._router, self._experts = block.get_submodule(router), block.get_submodule(experts)

    def __call__(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, hidden.shape[-1])
        out: Tensor = self._experts(x, *self._router(x)[1:])
        return out.view_as(hidden)


def _factors(count: int) -> Tensor:
    return torch.arange(1.0, count + 1)
