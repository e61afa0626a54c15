"""What an adapter must do whoever asked for it."""

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.support.served import COMPLETION, PROMPT, decode

Check = Callable[[str, str], None]


@pytest.fixture
def serves(http: httpx.Client, root: Path, expected: Callable[[str, int], list[int]]) -> Check:
    """The name answers with the tokens of these weights, and is listed by our own routes."""

    def check(name: str, weights: str) -> None:
        body = {"model": name, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
        text = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
        assert text == decode(root, expected(weights, 12))
        assert http.get(f"/v1/adapters/{name}").json()["state"] == "ready"
        assert name in {it["id"] for it in http.get("/v1/adapters").json()["data"]}
        assert http.get(f"/v1/models/{name}").json()["parent"] == "tiny"

    return check


@pytest.fixture
def is_gone(http: httpx.Client) -> Callable[[str], None]:
    def check(name: str) -> None:
        assert http.get(f"/v1/adapters/{name}").status_code == 404
        assert http.post("/v1/completions", json=COMPLETION | {"model": name}).status_code == 404

    return check
