"""Fields of sampling and of ends, as requests have them: each changes the answer as it says."""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api.texts.text import Text
from tests.support.live_server import LiveServer
from tests.support.served import CHAT, PROMPT, decode, settle, stream_text

pytestmark = pytest.mark.slow
GREEDY: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}


def complete(http: httpx.Client, **fields: Any) -> Any:
    response = http.post("/v1/completions", json=GREEDY | fields)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


@pytest.fixture(scope="module")
def tokens(expected: Callable[[str, int], list[int]]) -> list[int]:
    """What is generated greedily."""
    return expected("tiny", 12)


def test_a_biased_token_is_always_chosen_and_a_banned_one_never(
    http: httpx.Client, root: Path, tokens: list[int]
) -> None:
    assert complete(http, logit_bias={"65": 100})["text"] == decode(root, [65] * 12)
    without = complete(http, logit_bias={str(tokens[0]): -100}, logprobs=0)["logprobs"]["tokens"]
    assert Text.load(root / "tiny").token_texts.of(tokens[0]).text not in without


def test_penalties_drive_repetition_out(http: httpx.Client) -> None:
    def letters(**fields: Any) -> int:
        few = {"65": 90, "66": 84, "67": 78}  # further apart than the model's own logits
        return len(set(complete(http, logit_bias=few, **fields)["text"]))

    assert letters() == 1
    assert letters(frequency_penalty=2) > 1  # 2 for each time
    assert letters(repetition_penalty=2) > 1
    close = {"65": 90, "66": 90, "67": 90}
    sticky, shy = (complete(http, logit_bias=close, presence_penalty=it)["text"] for it in (-2, 2))
    assert len(set(sticky)) < len(set(shy))


def test_min_p_of_one_is_greedy(http: httpx.Client) -> None:
    assert complete(http, temperature=1, min_p=1, seed=4)["text"] == complete(http)["text"]


def test_stop_tokens_end_the_answer_and_are_named(http: httpx.Client, root: Path, tokens: list[int]) -> None:
    stop = tokens[5]
    place = tokens.index(stop)
    choice = complete(http, stop_token_ids=[stop])
    assert (choice["text"], choice["finish_reason"]) == (decode(root, tokens[:place]), "stop")
    assert choice["stop_reason"] == stop and complete(http)["stop_reason"] is None


def test_no_stop_token_comes_before_the_least_number(http: httpx.Client, tokens: list[int]) -> None:
    stops = sorted(set(tokens[:4]))
    response = http.post("/v1/completions", json=GREEDY | {"stop_token_ids": stops, "min_tokens": 8}).json()
    assert response["usage"]["completion_tokens"] >= 8


def test_a_stop_string_is_named_and_kept_on_request(http: httpx.Client) -> None:
    text = complete(http)["text"]
    stop = text[3:5]
    choice = complete(http, stop=stop)
    assert (choice["text"], choice["stop_reason"]) == (text[: text.index(stop)], stop)
    kept = complete(http, stop=stop, include_stop_str_in_output=True)
    assert kept["text"] == text[: text.index(stop)] + stop


def test_an_answer_may_be_empty_where_only_the_prompt_is_wanted(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json=GREEDY | {"prompt": "hello", "max_tokens": 0, "echo": True}).json()
    assert answer["choices"][0]["text"] == "hello" and answer["choices"][0]["finish_reason"] == "length"
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (5, 0)
    streamed = stream_text(http, **GREEDY | {"prompt": "hello", "max_tokens": 3, "echo": True})
    assert streamed[0]["choices"][0]["text"].startswith("hello")


# -- time ---


@pytest.fixture(scope="module")
def slow(root: Path) -> Iterator[LiveServer]:
    """One whose streams are told soon that nothing comes."""
    server = LiveServer(str(root / "tiny"), "--keep-alive-s", "0.3", log=root / "slow-log").wait_ready()
    yield server
    assert server.stop() == 0, server.output()


@contextmanager
def held(server: LiveServer) -> Iterator[None]:
    """The engine stands still meanwhile."""
    engine = server.engine
    engine.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        engine.send_signal(signal.SIGCONT)


def test_a_stream_in_which_nothing_comes_is_kept_alive(slow: LiveServer) -> None:
    body = {**CHAT, "max_tokens": 3, "stream": True}
    with httpx.Client(base_url=slow.url, timeout=30) as http, ExitStack() as stack:
        stack.enter_context(held(slow))
        with http.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = (line for line in response.iter_lines() if line)
            assert [next(lines) for _ in range(3)] == [": keep-alive"] * 3
            stack.close()
            rest = list(lines)
    assert rest[-1] == "data: [DONE]" and json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
    assert set(rest[: rest.index(next(it for it in rest if it.startswith("data")))]) <= {": keep-alive"}


def test_a_request_may_say_how_long_it_waits(slow: LiveServer) -> None:
    with httpx.Client(base_url=slow.url, timeout=30) as http, held(slow):
        response = http.post("/v1/chat/completions", json={**CHAT, "timeout": 0.4})
    assert response.status_code == 504 and response.headers["x-should-retry"] == "false"
    assert response.json()["error"]["code"] == "timeout" and "0.4 s (timeout)" in response.json()["error"]["message"]
    settle(slow)


def test_a_stream_whose_time_is_over_ends_with_an_error_and_its_work_with_it(slow: LiveServer) -> None:
    body = {**CHAT, "max_tokens": 400, "timeout": 3.0, "stream": True}
    with httpx.Client(base_url=slow.url, timeout=30) as http:
        with http.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = (line for line in response.iter_lines() if line.startswith("data"))
            assert next(lines).startswith("data: {")
            with held(slow):
                rest = list(lines)
    assert json.loads(rest[-1][6:])["error"]["code"] == "timeout" and "data: [DONE]" not in rest
    settle(slow)
