"""Who is let in, how much text waits, and what a body becomes for the engine: on a service without an engine."""

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from adapters_store.catalog import Catalog
from adapters_store.manifest import Manifest, SamplingDefaults
from adapters_store.records import Version, Weights
from adapters_store.ref import AdapterRef
from server.api import service as service_module
from server.api.app import create_app
from server.api.generating.generation import Generation, plan
from server.api.protocol.completions import CompletionBody
from server.api.service import Service
from server.api.transport.bodies import validated
from server.config import EngineConfig, ServerConfig
from server.errors import EngineDead, EngineSilent, HeddleError, InvalidRequest, NotFound, Overloaded, ShuttingDown
from server.lifecycle.leases import Leases

REF = AdapterRef("adapter", "1" * 64, "lora")
DEFAULTS = Manifest(
    sampling=SamplingDefaults(temperature=0.0, top_p=0.5, top_k=3, max_tokens=20), stop=("end",), weight=3.0, priority=2
)
CONTEXT, VOCAB, STOP = 100, 50, frozenset([7])


class Text:
    """As far as counting goes: a character is a token, and no token is longer than two."""

    def __init__(self) -> None:
        self.may_work = threading.Event()
        self.may_work.set()

    def most_chars(self, num_tokens: int) -> int:
        return 2 * num_tokens

    def encode(self, texts: Sequence[str], max_tokens: int, param: str, _: bool) -> list[list[int]]:
        self.may_work.wait(5)
        return [[1] * len(text) for text in texts]


class Client:
    """An engine that lives, says when it last spoke, and has as much to do as a test says."""

    def __init__(self) -> None:
        self.death: str | None = None
        self.silence_s, self.num_requests = 0.0, 0

    def require_alive(self) -> None:
        if self.death is not None:
            raise EngineDead(self.death)


def make_service(directory: Path, **settings: Any) -> Any:
    catalog = Catalog("base")
    for name, manifest in (("adapter", Manifest()), ("described", DEFAULTS)):
        version = Version(REF.revision, "a", 0, manifest)
        change = catalog.registered(name, Weights(REF.revision, "lora", 1), version, is_durable=True)
        assert change is not None
        catalog.apply(change)
    lifecycle = SimpleNamespace(catalog=catalog, leases=Leases())
    uploads = SimpleNamespace(limits=SimpleNamespace(max_upload_bytes=1))
    info: Any = SimpleNamespace(max_model_len=CONTEXT, vocab_size=VOCAB, kv_cache_tokens=300, stop_token_ids=STOP)
    unused: Any = None
    settings = {"max_n": 4, "max_sequences": 6, "max_concurrent_requests": 10} | settings
    config, client, text = ServerConfig(EngineConfig(str(directory)), **settings), Client(), Text()
    texts = SimpleNamespace(for_template=lambda template: text)
    parts: Any = (client, lifecycle, uploads, unused, texts)
    return Service(config, info, *parts, unused, unused, started=0)


@pytest.fixture
def service(tmp_path: Path) -> Any:
    return make_service(tmp_path)


# -- who is let in ---


def test_as_many_are_let_in_as_may_be_under_way(service: Any) -> None:
    service.client.num_requests = 4
    first = service.admit(5)
    with service.admit(1):
        with pytest.raises(Overloaded, match="10 completions are under way; at most 10 are taken at once"):
            service.admit(1)
    service.admit(1)  # that one has given its place back
    first.end()
    first.end()  # safe any number of times
    service.admit(5)
    with pytest.raises(Overloaded):
        service.admit(1)


def test_a_failure_gives_the_place_back(service: Any) -> None:
    for _ in range(20):
        with pytest.raises(InvalidRequest), service.admit(6):
            raise InvalidRequest("no")


def test_one_request_may_be_of_so_many_sequences(service: Any) -> None:
    with service.admit(6):
        pass
    with pytest.raises(InvalidRequest, match="7 completions in one request; at most 6 are served"):
        service.admit(7)


@pytest.mark.parametrize(
    ("state", "raised", "health"),
    [
        ({"death": "killed"}, EngineDead, (503, {"status": "engine_dead", "reason": "killed"})),
        ({"silence_s": 30.0}, None, (200, {"status": "ok"})),
        ({"silence_s": 30.6}, EngineSilent,
         (503, {"status": "engine_silent", "reason": "the engine has said nothing for 31 s"})),
        ({"is_draining": True}, ShuttingDown, (503, {"status": "shutting_down"})),
        ({"death": "killed", "silence_s": 99.0, "is_draining": True}, ShuttingDown,
         (503, {"status": "engine_dead", "reason": "killed"})),
        ({}, None, (200, {"status": "ok"})),
    ],
)  # fmt: skip
def test_nobody_is_let_in_where_nobody_would_be_served_and_health_says_why(
    service: Any, state: dict[str, Any], raised: type[HeddleError] | None, health: tuple[int, dict[str, str]]
) -> None:
    service.is_draining = state.pop("is_draining", False)
    for name, value in state.items():
        setattr(service.client, name, value)
    if raised is None:
        service.admit(1)
    else:
        with pytest.raises(raised):
            service.admit(1)
    response = asyncio.run(get(service, "/health"))
    assert (response.status_code, response.json()) == health


async def get(service: Any, path: str) -> httpx.Response:
    transport = httpx.ASGITransport(create_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.get(path)


def test_a_model_is_the_base_or_an_adapter_by_its_exact_name(service: Any) -> None:
    assert service.meaning_of("base").ref is None and service.meaning_of("adapter").ref == REF
    for name in ("Base", "Adapter", "", "x" * 10_000):
        with pytest.raises(NotFound, match="does not exist") as refusal:
            service.meaning_of(name)
        assert (refusal.value.param, refusal.value.code) == ("model", "model_not_found")
        assert len(refusal.value.message) < 200


# -- how much text waits ---


def test_no_more_text_is_taken_than_could_be_tokens_of_one_request(service: Any) -> None:
    most = 2 * service.max_request_tokens
    assert asyncio.run(service.encode(["a" * (most - 1), "a"], "prompt")) == [[1] * (most - 1), [1]]
    with pytest.raises(InvalidRequest, match=f"have {most + 1:,} characters; at most {most:,} are served"):
        asyncio.run(service.encode(["a" * most, "a"], "prompt"))


@pytest.mark.parametrize(("asked", "served"), [(0, 400), (77, 77)])
def test_tokens_of_one_request_are_limited_by_a_setting_or_by_what_there_is(
    tmp_path: Path, asked: int, served: int
) -> None:
    assert make_service(tmp_path, max_request_tokens=asked).max_request_tokens == served


def test_the_cache_may_hold_more_than_all_choices_of_one_prompt(tmp_path: Path) -> None:
    assert make_service(tmp_path, max_n=2).max_request_tokens == 300


def test_short_texts_are_tokenized_at_once_and_long_ones_queue(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "_LONG_TEXT", 100)
    monkeypatch.setattr(service_module, "_MOST_QUEUED", 250)

    async def test() -> None:
        service.text.may_work.clear()
        long = [asyncio.create_task(service.encode(["a" * size], "prompt")) for size in (150, 100)]
        await asyncio.sleep(0.01)
        with pytest.raises(Overloaded, match="250 characters wait to be tokenized; 250 may"):
            await service.encode(["a" * 100], "prompt")
        service.text.may_work.set()
        assert await service.encode(["a" * 99], "prompt") == [[1] * 99]  # short: nothing queues for it
        assert [len(it[0]) for it in await asyncio.gather(*long)] == [150, 100]
        alone = await service.encode(["a" * 600], "prompt")  # where nothing waits the longest is taken
        assert len(alone[0]) == 600

    asyncio.run(test())


# -- what the engine is asked ---


def planned(service: Any, prompts: list[list[int]], max_tokens: int | None = 5, **fields: Any) -> Generation:
    body = validated(CompletionBody, {"model": "adapter", "prompt": "x"} | fields, service.body_limits)
    meant = service.meaning_of(body.model, body.who)
    wanted = body.wanted(meant, max_tokens, body.n or 1, None, None)
    return plan(service, wanted, prompts, service.admit(1), service.lease(meant, 1), arrived=0.0)


def test_each_prompt_is_asked_n_times_with_seeds_that_follow_one_another(service: Any) -> None:
    submissions = planned(service, [[1], [2, 3]], n=2, seed=40, top_k=3, top_p=0.5, temperature=0.0).submissions
    assert [it.prompt for it in submissions] == [[1], [1], [2, 3], [2, 3]]
    assert [it.sampling.seed for it in submissions] == [40, 41, 42, 43]
    for it in submissions:
        assert (it.adapter, it.max_tokens, it.stop_token_ids) == (REF, 5, STOP)
        assert (it.sampling.temperature, it.sampling.top_p, it.sampling.top_k) == (0.0, 0.5, 3)


def test_what_is_not_said_is_openais_default(service: Any) -> None:
    sampling = planned(service, [[1]], model="base").submissions[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)
    assert planned(service, [[1]], model="base").submissions[0].adapter is None
    seeds = {planned(service, [[1]]).submissions[0].sampling.seed for _ in range(5)}
    assert len(seeds) == 5 and all(0 <= seed < 2**63 for seed in seeds)


def test_what_is_not_said_is_as_the_adapters_manifest_has_it(service: Any) -> None:
    generation = planned(service, [[1], [2] * 95], max_tokens=None, model="described")
    first, second = generation.submissions
    assert (first.sampling.temperature, first.sampling.top_p, first.sampling.top_k) == (0.0, 0.5, 3)
    assert (first.max_tokens, second.max_tokens) == (20, 5)  # a default is cut where the context ends
    assert (first.weight, first.priority, generation.wanted.stop_strings) == (3.0, 512, ("end",))
    said = planned(service, [[1]], model="described", temperature=1.5, top_p=1, top_k=-1, stop=[], cache_salt="mine")
    (submission,) = said.submissions
    assert (submission.sampling.temperature, submission.sampling.top_p, submission.sampling.top_k) == (1.5, 1.0, 0)
    assert (submission.max_tokens, submission.salt, said.wanted.stops) == (5, "mine", [])


@pytest.mark.parametrize(("top_k", "kept"), [(-1, 0), (0, 0), (1, 1), (VOCAB, VOCAB), (2**31 - 1, VOCAB)])
def test_top_k_is_at_most_the_vocabulary_and_nothing_means_all(service: Any, top_k: int, kept: int) -> None:
    assert planned(service, [[1]], top_k=top_k).submissions[0].sampling.top_k == kept


@pytest.mark.parametrize(("seed", "first"), [(-1, 2**63 - 1), (2**63 - 1, 2**63 - 1)])
def test_seeds_wrap_around_what_the_engine_takes(service: Any, seed: int, first: int) -> None:
    seeds = [it.sampling.seed for it in planned(service, [[1], [2]], seed=seed).submissions]
    assert seeds == [first, 0]


def test_without_a_limit_an_answer_may_fill_the_context(service: Any) -> None:
    submissions = planned(service, [[1] * 30, [2] * 99], max_tokens=None).submissions
    assert [it.max_tokens for it in submissions] == [70, 1]
    assert planned(service, [[1] * 95], max_tokens=5).submissions[0].max_tokens == 5


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "param", "says"),
    [
        ([], 5, "prompt", "the prompt has no tokens"),
        ([1] * 96, 5, "max_tokens", "96 tokens and max_tokens is 5; this model's maximum context length is 100 tokens"),
        ([1] * 100, None, "messages", "the prompt is too long: it has 100 tokens and leaves no room"),
        ([1, VOCAB], 5, "prompt", "the token id 50; the model knows 0 to 49"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_with_the_numbers(
    service: Any, prompt: list[int], max_tokens: int | None, param: str, says: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        planned(service, [[1], prompt], max_tokens)
    assert says in refusal.value.message and refusal.value.param == param


def test_all_that_one_request_asks_for_is_counted_together(service: Any) -> None:
    assert len(planned(service, [[1] * 50] * 4, max_tokens=50).submissions) == 4
    with pytest.raises(InvalidRequest, match="5 completions of up to 405 tokens .* at most 400 are served"):
        planned(service, [[1] * 41] * 5, max_tokens=40)
