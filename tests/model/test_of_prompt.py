"""What is told of prompts where the model gives what is no number, and that only whose it is hears of it."""

import math
from collections.abc import Callable

import numpy
import pytest
import torch
from torch import Tensor

from kernels.adapter_rows import ShapeKey
from server.engine.fake_masks import FakeMasks
from server.engine.plan import Output, Scheduled
from server.engine.request import LaneSpec, OfPrompt, Request, Sampling
from server.model.draws import Draws
from server.model.forward import Computed
from server.model.inputs import HostStep, lay_out
from server.model.runner import NOT_FINITE, ModelRunner

VOCAB, HIDDEN = 20, 6


class MadeUp:
    """A forward whose logits and hidden states follow from tokens and positions, but for what a test spoils."""

    def __init__(self, spoil: Callable[[HostStep, Tensor, Tensor], object]) -> None:
        self._spoil = spoil

    def compute(self, step: HostStep, draws: Draws | None = None) -> Computed:
        return Computed(self.logits_and_hidden(step)[0])

    def all_logits(self, step: HostStep) -> Tensor:
        raise NotImplementedError

    def logits_and_hidden(self, step: HostStep) -> tuple[Tensor, Tensor]:
        seeds = (step.token_ids * 100 + step.positions).tolist()
        rows = torch.stack([torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        hidden = rows[:, :HIDDEN].clone()
        self._spoil(step, rows, hidden)
        return rows[step.logit_rows.tolist()], hidden

    def shape_key(self, slot: int) -> ShapeKey:
        return ShapeKey()


def outputs(requests: list[Request], chunk: int, spoil: Callable[[HostStep, Tensor, Tensor], object]) -> list[Output]:
    """Each request's, with so many tokens of each in a step."""
    forward = MadeUp(spoil)
    runner = ModelRunner(forward, forward, block_size=4, masks=FakeMasks())
    found: dict[int, Output] = {}
    for number, request in enumerate(requests):
        request.first.block_table = list(range(10 * number, 10 * number + 10))
    while len(found) < len(requests):
        plan = []
        for request in requests:
            lane = request.first
            count = min(chunk, lane.num_uncomputed_tokens)
            if count:
                plan.append(Scheduled(lane, lane.num_computed_tokens, count, count == lane.num_uncomputed_tokens))
        told = runner.launch(plan).outputs()
        for it in plan:
            it.lane.num_computed_tokens += it.num_tokens
        found |= {requests.index(lane.request): output for lane, output in told.items()}
    return [found[number] for number in range(len(requests))]


def request(token: int, of_prompt: OfPrompt | None) -> Request:
    pools = of_prompt is not None and of_prompt.pooling is not None
    prompt = [token] * 9
    return Request(token, [LaneSpec(prompt)], 0 if pools else 1, Sampling(temperature=0.0), of_prompt=of_prompt)


ASKS = [OfPrompt(2), OfPrompt(pooling="mean"), OfPrompt(pooling="last"), OfPrompt(0, "mean"), None]


def spoiled_at(token: int, position: int, value: float, where: str) -> Callable[[HostStep, Tensor, Tensor], None]:
    def spoil(step: HostStep, logits: Tensor, hidden: Tensor) -> None:
        for row, (its, at) in enumerate(zip(step.token_ids, step.positions, strict=True)):
            if (its, at) == (token, position):
                (logits if where == "logits" else hidden)[row, 3] = value

    return spoil


@pytest.mark.parametrize("chunk", [2, 4, 9])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("token", "where", "position", "fails"), [
    (0, "logits", 0, True), (0, "logits", 4, True), (0, "logits", 8, True),
    (1, "hidden", 0, True), (1, "hidden", 8, True), (1, "logits", 3, False),
    (2, "hidden", 8, True), (2, "hidden", 4, False),
    (3, "logits", 4, True), (3, "hidden", 5, True), (3, "logits", 8, False),  # nothing is chosen with those
    (4, "logits", 4, False), (4, "logits", 8, True),
])  # fmt: skip
def test_what_is_no_number_fails_alone(
    chunk: int, value: float, token: int, where: str, position: int, fails: bool
) -> None:
    usual = outputs([request(number, asks) for number, asks in enumerate(ASKS)], chunk, lambda *_: None)
    assert all(it.error is None for it in usual)
    got = outputs(
        [request(number, asks) for number, asks in enumerate(ASKS)], chunk, spoiled_at(token, position, value, where)
    )
    if fails:
        assert got[token] == Output(error=NOT_FINITE, is_not_finite=True)
        usual[token] = got[token]
    assert got == usual


def test_a_chunk_that_starts_anew_forgets_what_was_before() -> None:
    it = request(1, OfPrompt(1, "mean"))
    it.first.block_table = list(range(10))
    forward = MadeUp(lambda *_: None)
    runner = ModelRunner(forward, forward, block_size=4, masks=FakeMasks())
    for start, count in ((0, 4), (4, 2), (0, 3), (3, 6)):  # preempted behind six tokens
        told = runner.launch([Scheduled(it.first, start, count, start + count == 9)]).outputs()
    of_prompt = told[it.first].of_prompt
    assert of_prompt is not None and of_prompt.logprobs is not None and of_prompt.vector is not None
    assert len(of_prompt.logprobs) == 8 and it.first.carried is None
    step = lay_out([Scheduled(it.first, 0, 9, True)], forward, 4)
    mean = forward.logits_and_hidden(step)[1].mean(0)
    assert numpy.frombuffer(of_prompt.vector, "<f4").tolist() == pytest.approx(mean.tolist(), abs=1e-6)
