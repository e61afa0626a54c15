"""/v1/embeddings: the vectors that Transformers computes, for the base and for adapters, in whichever words they are
asked for."""

import asyncio
import base64
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import openai
import pytest
import torch

from adapters_store.rules import Rules
from server.api.generating import embeddings
from server.api.protocol.body import BodyLimits
from server.api.protocol.embeddings import EmbeddingBody
from server.api.transport.bodies import validated
from server.errors import GenerationFailed
from tests.support.engine_harness import Engine
from tests.support.live_server import LiveServer
from tests.support.served import PROMPT, tiny
from tests.support.served import settle as settled
from tests.support.tiny_adapters import merge
from tests.support.waiting import soon

CLOSE = 1e-4
HIDDEN = 64
LIMITS = BodyLimits(max_model_len=10, vocab_size=100, max_prompts=2, max_n=2, max_stop=2, max_stop_chars=3,
                    max_messages=2, max_parts=2, max_logprobs=5, max_tools=2)  # fmt: skip
PROMPTS = [PROMPT, [7], list(range(3, 250)), PROMPT[:4]]


def body(**fields: Any) -> EmbeddingBody:
    return validated(EmbeddingBody, {"model": "tiny", "input": "x"} | fields, LIMITS)


# -- words, without an engine ---


def test_base64_holds_what_the_list_holds_in_openais_bytes() -> None:
    raw = struct.pack("<4f", 3.0, -4.0, 0.0, 1e-30)
    listed = embeddings.worded(raw, body(normalize=False))
    assert isinstance(listed, msgspec.Raw) and msgspec.json.decode(listed) == list(struct.unpack("<4f", raw))
    assert embeddings.worded(raw, body(normalize=False, encoding_format="base64")) == base64.b64encode(raw).decode()
    told = embeddings.worded(raw, body(encoding_format="base64"))
    assert isinstance(told, str)
    assert struct.unpack("<4f", base64.b64decode(told)) == pytest.approx((0.6, -0.8, 0.0, 2e-31))


@pytest.mark.parametrize("size", [1.0, 3e38, 1e-38])
def test_a_vector_is_made_as_long_as_one_whatever_it_was(size: float) -> None:
    raw = struct.pack("<3f", size, 0.0, size)
    vector = msgspec.json.decode(embeddings.worded(raw, body()))
    assert vector == pytest.approx([2**-0.5, 0.0, 2**-0.5])


def test_a_vector_without_a_direction_stays_and_one_that_is_no_number_is_not_told() -> None:
    assert msgspec.json.decode(embeddings.worded(bytes(12), body())) == [0.0, 0.0, 0.0]
    for value in (float("nan"), float("inf")):
        for how in ({}, {"encoding_format": "base64"}, {"normalize": False}):
            with pytest.raises(GenerationFailed):
                embeddings.worded(struct.pack("<2f", 1.0, value), body(**how))


# -- with one ---


@pytest.fixture(scope="module")
def hidden(root: Path) -> Callable[[str, str, list[int]], Any]:
    """What Transformers has of the merged model."""
    rules = Rules(Engine(tiny()).assembly.info.base, (root / "adapters", root / "more"))
    models: dict[str, Any] = {"tiny": tiny()}

    def vector(name: str, pooling: str, prompt: list[int]) -> Any:
        if name not in models:
            models[name] = merge(tiny(), rules.read(name, str(root / "adapters" / name)))
        with torch.inference_mode():
            states = models[name].model(torch.tensor([prompt])).last_hidden_state[0]
        return (states.mean(0) if pooling == "mean" else states[-1]).numpy()

    return vector


def ask(http: httpx.Client, **fields: Any) -> Any:
    response = http.post("/v1/embeddings", json={"model": "tiny"} | fields)
    assert response.status_code == 200, response.text
    return response.json()


def vectors(answer: Any) -> list[Any]:
    assert answer["object"] == "list"
    assert [(it["object"], it["index"]) for it in answer["data"]] == [
        ("embedding", index) for index in range(len(answer["data"]))
    ]
    return [np.array(it["embedding"]) for it in answer["data"]]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny", "lora", "esft"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_vectors_equal_transformers(
    http: httpx.Client, hidden: Callable[[str, str, list[int]], Any], model: str, pooling: str
) -> None:
    for _ in range(2):  # the second time the cache knows the prompts
        plain = ask(http, model=model, input=PROMPTS, pooling=pooling, normalize=False)
        for prompt, vector in zip(PROMPTS, vectors(plain), strict=True):
            expected = hidden(model, pooling, prompt)
            assert vector.shape == expected.shape == (HIDDEN,)
            np.testing.assert_allclose(vector, expected, rtol=CLOSE, atol=CLOSE)
    assert plain["model"] == model
    assert plain["usage"] == {"prompt_tokens": sum(map(len, PROMPTS)), "total_tokens": sum(map(len, PROMPTS))}
    for prompt, unit in zip(PROMPTS, vectors(ask(http, model=model, input=PROMPTS, pooling=pooling)), strict=True):
        expected = hidden(model, pooling, prompt)
        np.testing.assert_allclose(unit, expected / np.linalg.norm(expected), rtol=CLOSE, atol=CLOSE)


@pytest.mark.slow
def test_openais_client_gets_the_same_in_either_encoding(client: openai.OpenAI, http: httpx.Client) -> None:
    told = client.embeddings.create(model="lora", input=["one", "another"])  # it asks for base64, and decodes
    listed = client.embeddings.create(model="lora", input=["one", "another"], encoding_format="float")
    for one, other in zip(told.data, listed.data, strict=True):  # other batches round otherwise
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
    assert [len(it.embedding) for it in told.data] == [HIDDEN, HIDDEN]
    assert [np.linalg.norm(it.embedding) for it in told.data] == pytest.approx([1, 1])
    assert told.usage.prompt_tokens == told.usage.total_tokens == len("oneanother") and told.model == "lora"
    same = client.embeddings.create(model="lora", input="one", dimensions=HIDDEN, user="me")
    assert same.data[0].embedding == pytest.approx(told.data[0].embedding, abs=CLOSE)
    assert isinstance(ask(http, input="x", encoding_format="base64")["data"][0]["embedding"], str)


@pytest.mark.slow
def test_as_many_prompts_as_may_be_come_back_in_order(
    http: httpx.Client, server: LiveServer, hidden: Callable[[str, str, list[int]], Any]
) -> None:
    many = [PROMPT[: 1 + number % 9] + [number] for number in range(64)]
    found = vectors(ask(http, model="esft", input=many, normalize=False))
    for prompt, vector in zip(many, found, strict=True):
        np.testing.assert_allclose(vector, hidden("esft", "mean", prompt), rtol=CLOSE, atol=CLOSE)
    assert http.post("/v1/embeddings", json={"model": "tiny", "input": [[1]] * 65}).status_code == 400
    settled(server)


@pytest.mark.slow
def test_it_batches_with_completions_of_other_adapters(
    http: httpx.Client, client: openai.OpenAI, hidden: Callable[[str, str, list[int]], Any]
) -> None:
    alone = client.completions.create(model="lora", prompt=PROMPT, max_tokens=60, temperature=0).choices[0].text
    with ThreadPoolExecutor(4) as pool:
        texts = [
            pool.submit(client.completions.create, model="lora", prompt=PROMPT, max_tokens=60, temperature=0)
            for _ in range(3)
        ]
        for _ in range(5):
            for vector, prompt in zip(vectors(ask(http, input=PROMPTS, normalize=False)), PROMPTS, strict=True):
                np.testing.assert_allclose(vector, hidden("tiny", "mean", prompt), rtol=CLOSE, atol=CLOSE)
        assert [it.result().choices[0].text for it in texts] == [alone] * 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "status", "param", "says"),
    [
        ({"dimensions": 32}, 400, "dimensions", "this model's vectors have 64"),
        ({"dimensions": 0}, 400, "dimensions", "greater than or equal to 1"),
        ({"input": []}, 400, "input", "0 prompts in one request"),
        ({"input": ""}, 400, "input", "no tokens"),
        ({"input": [[]]}, 400, "input", "no tokens"),
        ({"input": "x" * 513}, 400, "input", "513 tokens"),
        ({"input": [300]}, 400, "input", "token ids are 0 to 255"),
        ({"input": "<|beyond|>"}, 400, "input", "the model knows 0 to 255"),
        ({"input": {"text": "x"}}, 400, "input", "must be a text"),
        ({"encoding_format": "int8"}, 400, "encoding_format", "'float' or 'base64'"),
        ({"pooling": "cls"}, 400, "pooling", "'mean' or 'last'"),
        ({"normalize": 1}, 400, "normalize", "boolean"),
        ({"max_tokens": 1}, 400, "max_tokens", "not a field"),
        ({"timeout": 0}, 400, "timeout", "greater than 0"),
        ({"model": "nope"}, 404, "model", "does not exist"),
    ],
)
def test_what_is_not_served_is_refused_by_name(
    http: httpx.Client, fields: dict[str, Any], status: int, param: str, says: str
) -> None:
    response = http.post("/v1/embeddings", json={"model": "tiny", "input": "x"} | fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param) and says in error["message"], error


@pytest.mark.slow
def test_a_prompt_may_fill_the_context(http: httpx.Client, hidden: Callable[[str, str, list[int]], Any]) -> None:
    prompt = [number % 251 for number in range(512)]
    (vector,) = vectors(ask(http, input=prompt, pooling="last", normalize=False))
    np.testing.assert_allclose(vector, hidden("tiny", "last", prompt), rtol=CLOSE, atol=CLOSE)


@pytest.mark.slow
def test_a_client_that_leaves_gives_everything_back(server: LiveServer) -> None:
    async def leave() -> None:
        async with httpx.AsyncClient(base_url=server.url) as http:
            asked = [
                asyncio.create_task(http.post("/v1/embeddings", json={"model": "lora", "input": [PROMPTS[2]] * 64}))
                for _ in range(4)
            ]
            await soon(lambda: server.stats()["heddle_requests_running"])
            for it in asked:
                it.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    asyncio.run(leave())
    settled(server)
    counted = httpx.get(f"{server.url}/metrics").text
    assert 'heddle_requests_total{finish="cancelled",model="lora"}' in counted


@pytest.mark.slow
def test_its_own_timeout_ends_it(http: httpx.Client, server: LiveServer) -> None:
    response = http.post("/v1/embeddings", json={"model": "tiny", "input": [PROMPTS[2]] * 64, "timeout": 0.001})
    assert response.status_code == 504 and response.json()["error"]["code"] == "timeout"
    settled(server)
