"""A linear that adds each request's own LoRA."""

import torch.nn.functional as F
from torch import Tensor, nn

from kernels.lora import lora
from server.model.inputs import CurrentStep


class LoraLinear(nn.Module):
    """Takes an nn.Linear's place, weights and all. `name` is the linear's name in the model, as adapters know it."""

    def __init__(self, linear: nn.Linear, name: str, step: CurrentStep) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._name = name
        self._step = step
        # logits are computed for sampled rows only, so their segments are other ones
        self._is_lm_head = name == "lm_head"

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        inputs = self._step.inputs
        segments = inputs.sample_segments if self._is_lm_head else inputs.segments
        if segments:
            weights = inputs.tables.lora_weights(self._name)
            if weights:
                lora(y.view(-1, self.out_features), x.reshape(-1, self.in_features), weights, segments)
        return y
