"""Routers: the logits are ours, in float32; the rule by which experts are chosen is read off the family's router."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from kernels.expert_route import GroupScore, Routing, Score
from server.model.families import Foreign, UnsupportedModelError
from server.model.linears import AdaptedLinear
from server.model.product import DenseProduct


def _deepseek_v2(router: Foreign) -> Routing:
    match router.topk_method:
        case "greedy":
            return Routing(router.top_k, scale=router.routed_scaling_factor)
        case "group_limited_greedy":
            return Routing(router.top_k, scale=router.routed_scaling_factor, num_groups=router.num_group,
                           top_groups=router.topk_group)  # fmt: skip
    raise UnsupportedModelError(
        f"topk_method {router.topk_method!r} is not served; greedy and group_limited_greedy are"
    )


def _deepseek_v3(router: Foreign) -> Routing:
    return Routing(router.top_k, Score.SIGMOID, router.norm_topk_prob, router.routed_scaling_factor, router.num_group,
                   router.topk_group, GroupScore.TOP2_SUM)  # fmt: skip


def _softmax(router: Foreign) -> Routing:
    return Routing(router.top_k, renormalise=router.norm_topk_prob)


RULES: dict[str, Callable[[Foreign], Routing]] = {
    "DeepseekV2TopkRouter": _deepseek_v2,
    "DeepseekV3TopkRouter": _deepseek_v3,
    "GptOssTopKRouter": lambda router: Routing(router.top_k, Score.SOFTMAX_OF_CHOSEN),
    "MixtralTopKRouter": lambda router: Routing(router.top_k, renormalise=True),
    "OlmoeTopKRouter": _softmax,
    "Qwen2MoeTopKRouter": _softmax,
    "Qwen3MoeTopKRouter": _softmax,
}


def logits_product(original: Foreign) -> DenseProduct:
    """The router's own product in float32: a choice hangs on the last digits of its logits."""
    experts, hidden = original.weight.shape
    bias = getattr(original, "bias", None)
    linear = skip_init(nn.Linear, hidden, experts, bias=bias is not None, dtype=torch.float32)
    linear.weight = nn.Parameter(original.weight.data.float(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.data.float(), requires_grad=False)
    return DenseProduct([linear])


class Router(nn.Module):
    """Takes a router's place: hands its logits on, where the original would hand on weights and choices.

    Adapters act on the logits, before the choice. Choosing and rerouting are one op with what follows, in
    RoutedExperts.
    """

    def __init__(self, original: Foreign, logits: AdaptedLinear) -> None:
        super().__init__()
        self.routing = RULES[type(original).__name__](original)
        self.logits = logits
        self.correction: Tensor | None
        correction = getattr(original, "e_score_correction_bias", None)
        self.register_buffer("correction", None if correction is None else correction.float())

    @property
    def weight(self) -> Tensor:
        """[M, H] float32."""
        assert isinstance(self.logits.product, DenseProduct)
        return self.logits.product.weight

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [.., H] -> logits [T, M] float32, thrice: a block passes on what it takes for weights and ids."""
        logits = self.logits(hidden.reshape(-1, hidden.shape[-1]).float())
        return logits, logits, logits
