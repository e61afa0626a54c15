"""From a step to logits: on the host by the references, on a GPU by kernels and captured graphs."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from server.model.device_inputs import DeviceInputs
from server.model.families import Foreign
from server.model.inputs import CurrentStep, HostStep, StepInputs, TokenField, host_inputs, of_all_rows


class Forward(Protocol):
    def logits(self, step: HostStep) -> Tensor:
        """[sampled rows, V]; valid until the next step."""

    def all_logits(self, step: HostStep) -> Tensor:
        """[T, V]: of every token, whether it is sampled or not. From no captured graph."""


class Model:
    """The injected model, as a function of a step's tensors."""

    def __init__(self, model: Foreign, step: CurrentStep) -> None:
        self._model, self._step = model, step
        self.vocab_size: int = model.config.vocab_size

    def __call__(self, inputs: StepInputs) -> Tensor:
        with self._step.of(inputs):
            out: Tensor = self._model(
                input_ids=inputs.token_ids[None],
                position_ids=inputs.positions[None],
                use_cache=False,
                logits_to_keep=inputs.sample_rows,
            ).logits[0]
            return out


class HostForward:
    """By the references."""

    def __init__(
        self, model: Model, block_size: int, dtype: torch.dtype, token_fields: Sequence[TokenField] = ()
    ) -> None:
        self._model, self._block_size, self._dtype = model, block_size, dtype
        self._token_fields = tuple(token_fields)

    def logits(self, step: HostStep) -> Tensor:
        return self._model(self._inputs(step))

    def all_logits(self, step: HostStep) -> Tensor:
        return self._model(of_all_rows(self._inputs(step)))

    def _inputs(self, step: HostStep) -> StepInputs:
        return host_inputs(step, self._block_size, self._dtype, self._token_fields)


class KernelForward:
    """By kernels, each launched in turn."""

    def __init__(self, model: Model, inputs: DeviceInputs) -> None:
        self.model, self.inputs = model, inputs

    def logits(self, step: HostStep) -> Tensor:
        return self.model(self._fill(step))

    def all_logits(self, step: HostStep) -> Tensor:
        return self.model(of_all_rows(self._fill(step)))

    def _fill(self, step: HostStep) -> StepInputs:
        return self.inputs.fill(step, len(step.token_ids), step.shape)
