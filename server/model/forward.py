"""From a step to logits: on the host step by step, on a GPU by captured graphs."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from server.model.device_inputs import DeviceInputs
from server.model.families import Foreign
from server.model.inputs import CurrentStep, HostStep, StepInputs, TokenField, host_inputs, of_all_rows


class Forward(Protocol):
    def logits(self, step: HostStep) -> Tensor:
        """[rows whose logits are wanted, V]; valid until the next step."""

    def all_logits(self, step: HostStep) -> Tensor:
        """[T, V]: of every token, whether it is sampled or not. From no captured graph."""

    def logits_and_hidden(self, step: HostStep) -> tuple[Tensor, Tensor]:
        """`logits`, and [T, H]: the last hidden state of every token, which logits are made of. From no captured
        graph."""


class Model:
    """The injected model, as a function of a step's tensors."""

    def __init__(self, model: Foreign, step: CurrentStep) -> None:
        self._model, self._step = model, step
        # without its head, which Llama 4 has under another name than it says
        self._body = model.base_model if model.base_model is not model else model.model
        self.vocab_size: int = model.config.vocab_size

    def __call__(self, inputs: StepInputs) -> Tensor:
        with self._step.of(inputs):
            out: Tensor = self._model(
                input_ids=inputs.token_ids[None],
                position_ids=inputs.positions[None],
                use_cache=False,
                logits_to_keep=inputs.logit_rows,
            ).logits[0]
            return out

    def with_hidden(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        """Logits, and what they are made of: what Transformers' model without a head calls last_hidden_state."""
        seen: list[Tensor] = []
        hook = self._body.register_forward_hook(lambda body, args, output: seen.append(output.last_hidden_state))
        try:
            logits = self(inputs)
        finally:
            hook.remove()
        (hidden,) = seen
        return logits, hidden[0]


class HostForward:
    """By the host's kernels, or the references where there are none."""

    def __init__(
        self, model: Model, block_size: int, dtype: torch.dtype, token_fields: Sequence[TokenField] = ()
    ) -> None:
        self._model, self._block_size, self._dtype = model, block_size, dtype
        self._token_fields = tuple(token_fields)

    def logits(self, step: HostStep) -> Tensor:
        return self._model(self._inputs(step))

    def all_logits(self, step: HostStep) -> Tensor:
        return self._model(of_all_rows(self._inputs(step)))

    def logits_and_hidden(self, step: HostStep) -> tuple[Tensor, Tensor]:
        return self._model.with_hidden(self._inputs(step))

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

    def logits_and_hidden(self, step: HostStep) -> tuple[Tensor, Tensor]:
        return self.model.with_hidden(self._fill(step))

    def _fill(self, step: HostStep) -> StepInputs:
        return self.inputs.fill(step, len(step.token_ids), step.shape)
