"""Bodies as large as are read must not hold up the others: /health is asked beside each, from a process of its own."""

import json
import multiprocessing
import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Event
from typing import Any

import httpx
import pytest

from tests.support.live_server import ROOT, LiveServer
from tests.support.tiny_models import save_model
from tests.support.waiting import eventually

pytestmark = [pytest.mark.slow, pytest.mark.alone]
CONTEXT = 131_072
MOST_S = 0.25  # 50 ms is what was measured on idle cores (benchmarks/README.md); these are shared
SENTENCE = "The quick brown fox jumps over the lazy dog 1234. "
MB = SENTENCE * (1_900_000 // len(SENTENCE))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A small model of a long context behind a tokenizer that has to work."""
    directory = tmp_path_factory.mktemp("stalls") / "tiny"
    sizes = dict(vocab_size=4096, max_position_embeddings=CONTEXT, hidden_size=32, num_hidden_layers=1)
    save_model(directory, "llama", **sizes)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ROOT / "demo" / "base" / name, directory)
    server = LiveServer(str(directory), "--kv-cache-bytes", str(1 << 28), log=directory.parent / "log").wait_ready()
    yield server
    assert server.stop() == 0


def ping(url: str, stop: Event, worst: Any) -> None:
    with httpx.Client(base_url=url, timeout=60) as client:
        client.get("/health")
        while not stop.is_set():
            start = time.monotonic()
            client.get("/health")
            with worst.get_lock():
                worst.value = max(worst.value, time.monotonic() - start)
            time.sleep(0.002)


@pytest.fixture(scope="module")
def worst(server: LiveServer) -> Iterator[Any]:
    """The longest that /health has taken since a test set it to 0. One process asks, for all tests: it takes seconds to
    start."""
    spawn = multiprocessing.get_context("spawn")
    stop, worst = spawn.Event(), spawn.Value("d", 0.0)
    pinger = spawn.Process(target=ping, args=(server.url, stop, worst))
    pinger.start()
    yield worst
    stop.set()
    pinger.join()


def user(content: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize(
    ("route", "fields", "status"),
    [
        ("completions", {"prompt": MB}, 400),
        ("completions", {"prompt": [MB[:9900]] * 64}, 200),
        ("completions", {"prompt": [12] * (CONTEXT + 1)}, 400),
        ("chat/completions", user(MB), 400),
        ("chat/completions", user("<|end|>" * 200_000), 400),
        ("chat/completions", {"messages": user("")["messages"] * 50_000}, 400),  # type: ignore[operator]
        ("chat/completions", {"messages": user("hello")["messages"] * 1000}, 200),  # type: ignore[operator]
        ("chat/completions", user([{"type": "text", "text": ""}] * 60_000), 400),
        ("completions", {str(number): 1 for number in range(150_000)}, 400),
        ("completions", {"prompt": [[]] * 600_000}, 400),
        ("completions", {"prompt": [""] * 600_000}, 400),
    ],
    ids=["prompt", "64 prompts", "ids", "message", "control tokens", "messages", "1,000 messages", "parts", "keys",
         "lists", "strings"],
)  # fmt: skip
def test_a_large_body_holds_nobody_up(
    server: LiveServer, worst: Any, route: str, fields: dict[str, Any], status: int
) -> None:
    raw = json.dumps({"model": "tiny", "max_tokens": 1} | fields, separators=(",", ":")).encode()
    with worst.get_lock():
        worst.value = 0.0
    eventually(lambda: worst.value)
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/{route}", content=raw, headers=headers, timeout=60)
    assert answer.status_code == status, answer.text
    assert worst.value < MOST_S


def test_texts_whose_clients_have_left_are_not_tokenized(server: LiveServer) -> None:
    raw = json.dumps({"model": "tiny", "max_tokens": 1} | user(MB)).encode()
    url = f"{server.url}/v1/chat/completions"
    start = time.monotonic()
    assert httpx.post(url, content=raw, headers={"Content-Type": "application/json"}, timeout=60).status_code == 400
    one = time.monotonic() - start
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}"
    )
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head.encode() + b"\r\n\r\n" + raw)
            time.sleep(0.03)
    body = {"model": "tiny", "max_tokens": 1} | user(MB[:11_000])
    start = time.monotonic()
    assert httpx.post(url, json=body, timeout=60).status_code == 200
    assert time.monotonic() - start < 10 * one  # and not twenty times as long, and more


def test_more_text_than_is_tokenized_in_seconds_is_turned_away(server: LiveServer) -> None:
    def ask(_: int) -> int:
        body = {"model": "tiny", "max_tokens": 1, "prompt": MB}
        return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code

    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(ask, range(8)))
    assert set(statuses) == {400, 503} and statuses.count(400) >= 4  # 8 million characters wait, not 15
