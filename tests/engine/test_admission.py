"""Whatever a message can express is served, or is one request's error; the engine and the others go on."""

import math
import re
from typing import Any

import msgspec
import pytest

from server.engine.messages import AddRequest, ToEngine, TokenEvent
from server.engine.request import FinishReason, LaneSpec, OfPrompt, Sampling
from tests.support.fake_engine import FakeEngine

IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    *(({"sampling": Sampling(**{name: value})}, f"{name} is {value}, which is no number")
      for name in ("temperature", "top_p", "min_p", "presence", "frequency", "repetition")
      for value in (math.nan, math.inf, -math.inf)),
    ({"sampling": Sampling(temperature=-0.5)}, "temperature is -0.5; it is at least 0"),
    ({"sampling": Sampling(repetition=0.0)}, "the repetition penalty is 0.0; it is more than 0"),
    ({"sampling": Sampling(bias={5: 1.0, 7: math.nan})}, "the bias of token 7 is nan"),
    ({"sampling": Sampling(bias={7: -math.inf})}, "the bias of token 7 is -inf"),
    ({"sampling": Sampling(min_tokens=5), "max_tokens": 4}, r"min_tokens \(5\) is more than max_tokens \(4\)"),
    ({"sampling": Sampling(num_logprobs=-1)}, "log-probabilities of -1 tokens; they are told of 0 to 1000"),
    ({"sampling": Sampling(num_logprobs=1 << 62)}, "log-probabilities of 4611686018427387904 tokens; they are told of"),
    ({"sampling": Sampling(bias={1000: 1.0})}, "a bias of token 1000; the model knows 0 to 999"),
    ({"sampling": Sampling(bias={-1: 1.0})}, "a bias of token -1; the model knows 0 to 999"),
    ({"sampling": Sampling(bias={(1 << 64) - 1: 1.0})}, "a bias of token 18446744073709551615; the model knows"),
    ({"of_prompt": OfPrompt(-2)}, "log-probabilities of -2 tokens in each place of the prompt"),
    ({"of_prompt": OfPrompt(pooling="last"), "max_tokens": 3}, "generates nothing; max_tokens is 3, not 0"),
    ({"lanes": [LaneSpec([1]), LaneSpec([2, 1000])]}, "token 1000 in a prompt; the model knows 0 to 999"),
    ({"lanes": [LaneSpec([1 << 63])]}, "token 9223372036854775808 in a prompt; the model knows 0 to 999"),
    ({"lanes": [LaneSpec([-1, 4])]}, "token -1 in a prompt; the model knows 0 to 999"),
]  # fmt: skip


def message(number: int, **fields: Any) -> AddRequest:
    """As it comes over the wire."""
    told = {"lanes": [LaneSpec([1, 2])], "max_tokens": 2, "sampling": Sampling()} | fields
    sent = AddRequest(number, number, stop_token_ids=frozenset(), **told)
    got = msgspec.msgpack.Decoder(ToEngine).decode(msgspec.msgpack.encode(sent))
    assert isinstance(got, AddRequest)
    return got


@pytest.mark.parametrize(("fields", "said"), IMPOSSIBLE)
def test_what_is_impossible_is_refused_alone(fields: dict[str, Any], said: str) -> None:
    setup = FakeEngine(vocab_size=1000)
    other = setup.add([3], 1)
    (event,) = setup.engine.step([message(7, **fields)])
    assert isinstance(event, TokenEvent) and event.finish is FinishReason.ERROR and event.token is None
    assert re.search(said, str(event.error)), event.error
    setup.run(3)
    assert other.finish is FinishReason.LENGTH and setup.is_done


@pytest.mark.parametrize("sampling", [
    Sampling(bias={5: 1e300}), Sampling(temperature=1e300), Sampling(top_k=-(1 << 62)), Sampling(top_k=1 << 62),
    Sampling(min_tokens=-3), Sampling(num_logprobs=1000), Sampling(seed=-1), Sampling(frequency=-1e300),
], ids=str)  # fmt: skip
def test_what_is_only_odd_is_let_through(sampling: Sampling) -> None:
    """The runner's to survive: tests/model/test_sampler.py."""
    events = FakeEngine().engine.step([message(7, sampling=sampling)])
    assert [isinstance(event, TokenEvent) and event.error for event in events] == [None]
