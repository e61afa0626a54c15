"""What would read back from the device in the middle of a step, which a captured graph cannot have."""

import torch
from torch import Tensor

from server.model.build import Build, Injected
from server.model.families import Foreign


def inject_without_read_backs(build: Build, injected: Injected) -> None:
    module: Foreign
    for module in build.model.modules():
        if hasattr(module, "warn_if_padding_and_no_attention_mask"):  # it looks for the padding's id among the tokens
            module.warn_if_padding_and_no_attention_mask = _say_nothing
        if hasattr(module, "_gaussian_topk") and module.activation_sparsity > 0:
            module._gaussian_topk = SparseGate(module.activation_sparsity)


def _say_nothing(*_: object) -> None:
    """No batch is padded here."""


class SparseGate:
    """Gemma 3n's gates: nought but for the largest, as if they were normally distributed. As its own, with the quantile
    taken once."""

    def __init__(self, sparsity: float) -> None:
        """sparsity: the part of the gates that becomes nought, below 1."""
        quantile = torch.distributions.Normal(0, 1).icdf(torch.tensor(sparsity))
        self._quantile = {dtype: float(quantile.to(dtype)) for dtype in (torch.float32, torch.float16, torch.bfloat16)}

    def __call__(self, gates: Tensor) -> Tensor:
        mean, deviation = gates.mean(-1, keepdim=True), gates.std(-1, keepdim=True, unbiased=False)
        return torch.relu(gates - (mean + deviation * self._quantile[gates.dtype]))
