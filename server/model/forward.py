"""From a step to logits: on the host step by step, on a GPU by captured graphs."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kernels.sampling import Sampled
from server.model.device_inputs import DeviceInputs
from server.model.draws import Draws
from server.model.expanded_prefill import HostSequences
from server.model.families import Foreign
from server.model.inputs import CurrentStep, HostStep, StepInputs, TokenField, host_inputs, of_all_rows


class Computed(NamedTuple):
    """logits [rows whose logits are wanted, V]: valid until the next step. sampled: of each row, where tokens were
    chosen along with them; then they are in `last` already."""

    logits: Tensor
    sampled: Sampled | None = None


class Forward(Protocol):
    """last: what was chosen in each row of the step before, where a step is launched before that is known. token_ids:
    of the last step, those that were fed back among them."""

    last: Sampled

    @property
    def token_ids(self) -> Tensor: ...

    def compute(self, step: HostStep, draws: Draws | None = None) -> Computed:
        """draws: how a token is drawn in each row of the logits, if one is in every row."""

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
        self, model: Model, most_sequences: int, dtype: torch.dtype, token_fields: Sequence[TokenField] = ()
    ) -> None:
        self._model, self._dtype, self._token_fields = model, dtype, tuple(token_fields)
        self.last = Sampled(torch.zeros(most_sequences, dtype=torch.int64), torch.zeros(most_sequences).bool())
        self.token_ids = self.last.tokens[:0]

    def compute(self, step: HostStep, draws: Draws | None = None) -> Computed:
        return Computed(self._model(self._inputs(step)))

    def all_logits(self, step: HostStep) -> Tensor:
        return self._model(of_all_rows(self._inputs(step)))

    def logits_and_hidden(self, step: HostStep) -> tuple[Tensor, Tensor]:
        return self._model.with_hidden(self._inputs(step))

    def _inputs(self, step: HostStep) -> StepInputs:
        inputs = host_inputs(step, self._dtype, self._token_fields, self.last.tokens)
        self.token_ids = inputs.token_ids
        return inputs


class KernelForward:
    """By kernels, each launched in turn."""

    def __init__(self, model: Model, inputs: DeviceInputs) -> None:
        self.model, self.inputs = model, inputs
        self.last, self.token_ids = inputs.last, inputs.token_ids

    def compute(self, step: HostStep, draws: Draws | None = None) -> Computed:
        return Computed(self.model(self._fill(step)))

    def all_logits(self, step: HostStep) -> Tensor:
        return self.model(of_all_rows(self._fill(step)))

    def logits_and_hidden(self, step: HostStep) -> tuple[Tensor, Tensor]:
        return self.model.with_hidden(self._fill(step))

    def _fill(self, step: HostStep) -> StepInputs:
        inputs = self.inputs.fill(step, step.shape)
        sequences = HostSequences(step.query_lens.tolist(), step.kv_lens.tolist(), step.block_tables)
        return replace(inputs, sequences=sequences)
