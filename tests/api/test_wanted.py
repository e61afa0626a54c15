"""What a request, its adapter's manifest and the server's defaults come to."""

import pytest

from adapters_store.manifest import PLAIN, Manifest, SamplingDefaults
from server.api.protocol.wanted import Wanted
from server.engine.request import Sampling
from server.errors import InvalidRequest
from server.lifecycle.models import Meant

DESCRIBED = Manifest(
    sampling=SamplingDefaults(temperature=0.5, top_p=0.6, top_k=7, min_p=0.1, presence_penalty=0.2,
                              frequency_penalty=0.3, repetition_penalty=1.4, max_tokens=20),
    stop=("end",), priority=2,
)  # fmt: skip


def meant(manifest: Manifest = PLAIN) -> Meant:
    return Meant("m", "m", None, manifest)


def test_what_nobody_says_is_plain_sampling() -> None:
    assert Wanted(meant()).sampling(3, 100) == Sampling(seed=3)


def test_a_manifest_says_what_the_request_does_not() -> None:
    assert Wanted(meant(DESCRIBED)).sampling(3, 100) == Sampling(0.5, 0.6, 7, 0.1, 3, 0.2, 0.3, 1.4)
    asked = Wanted(meant(DESCRIBED), temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, presence_penalty=0.0,
                   frequency_penalty=0.0, repetition_penalty=1.0)  # fmt: skip
    assert asked.sampling(3, 100) == Sampling(temperature=0.0, seed=3)


def test_a_request_that_asks_for_no_stop_string_has_none() -> None:
    assert list(Wanted(meant(DESCRIBED)).stop_strings) == ["end"]
    assert list(Wanted(meant(DESCRIBED), stops=[]).stop_strings) == []


def test_tokens_that_end_the_answer() -> None:
    asked = frozenset([5])
    assert Wanted(meant(), stop_token_ids=asked).stop_tokens(frozenset([7])) == {5, 7}
    assert Wanted(meant(), stop_token_ids=asked, ignores_eos=True).stop_tokens(frozenset([7])) == {5}


def test_a_manifests_priority_counts_before_a_requests() -> None:
    """Lower is earlier in requests, higher in manifests and in the engine."""
    low, high = Manifest(priority=1), Manifest(priority=2)
    order = [Wanted(meant(high), priority=100), Wanted(meant(low), priority=-100), Wanted(meant(low)),
             Wanted(meant(low), priority=100)]  # fmt: skip
    numbers = [it.engine_priority for it in order]
    assert numbers == sorted(numbers, reverse=True) and len(set(numbers)) == 4


def test_best_of_needs_log_probabilities_that_nobody_sees() -> None:
    assert Wanted(meant(), best_of=3).sampling(0, 9).num_logprobs == 0
    assert Wanted(meant(), n=3, best_of=3).sampling(0, 9).num_logprobs is None
    assert Wanted(meant(), best_of=3, num_logprobs=2).sampling(0, 9).num_logprobs == 2


def test_least_tokens_are_no_more_than_the_most() -> None:
    Wanted(meant(), min_tokens=4).check_least(4)
    with pytest.raises(InvalidRequest, match="min_tokens is 5, and at most 4 are generated"):
        Wanted(meant(), min_tokens=5).check_least(4)
