"""One small served model: what its tests ask, how they read the answers, and when all is given back."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from torch import nn

from server.api.texts.text import Text
from tests.support.live_server import LiveServer
from tests.support.tiny_models import make_model

VOCAB = 256  # one token a byte
PROMPT = [5, 99, 23, 7, 150, 42, 8, 8, 61]
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
COMPLETION = {"model": "tiny", "prompt": "x"}


def tiny() -> nn.Module:
    return make_model("qwen3_moe", vocab_size=VOCAB)


def decode(root: Path, tokens: list[int]) -> str:
    decoder = Text.load(root / "tiny").decoder()
    return "".join(decoder.push(token) for token in tokens) + decoder.flush()


def events(lines: Iterator[str]) -> list[Any]:
    """An independent reading of an event stream; the last one must be [DONE]."""
    text = "\n".join(lines).strip("\n")
    blocks = [block for block in text.split("\n\n") if block]
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    assert blocks[-1] == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


def stream_text(http: httpx.Client, **body: Any) -> list[Any]:
    with http.stream("POST", "/v1/completions", json={"prompt": PROMPT, "stream": True} | body) as response:
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
        return events(response.iter_lines())


def settle(server: LiveServer) -> None:
    """Everything is given back: nothing runs, nothing waits, no block is held."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        stats = server.stats()
        if stats["heddle_requests_running"] == stats["heddle_requests_waiting"] == stats["heddle_kv_blocks_used"] == 0:
            return
        time.sleep(0.05)
    raise AssertionError(f"not given back: {stats}")
