"""Adapters and clients that come and go while others decode."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.live_server import LiveServer
from tests.support.served import COMPLETION, PROMPT, decode, events, settle
from tests.support.tiny_adapters import save_lora
from tests.support.tiny_models import make_model

pytestmark = pytest.mark.slow


def test_adapters_come_and_go_while_others_decode(
    http: httpx.Client, root: Path, server: LiveServer, expected: Callable[[str, int], list[int]]
) -> None:
    late = root / "more" / "late"
    long = {"model": "esft", "prompt": PROMPT, "max_tokens": 400, "stream": True, "temperature": 0}
    with http.stream("POST", "/v1/completions", json=long) as streaming:
        lines = streaming.iter_lines()
        next(lines)
        added = http.post("/v1/adapters", json={"name": "late", "path": str(late)})
        assert added.status_code == 201 and added.json()["kind"] == "lora"
        assert http.post("/v1/adapters", json={"name": "late", "path": str(late)}).status_code == 200
        answer = http.post(
            "/v1/completions", json={"model": "late", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
        )
        assert answer.json()["choices"][0]["text"] == decode(root, expected("late", 12))
        shown = http.get("/v1/adapters/late").json()
        assert shown["device"]["state"] == "resident" and shown["device"]["bytes"] > 0
        assert shown["linears"]["model.layers.0.self_attn.o_proj"] == {"rank": 4, "scale": 2.0}
        assert {it["id"] for it in http.get("/v1/adapters").json()["data"]} == {"lora", "esft", "late"}
        # the adapter that is streaming is deleted: its stream goes on, new requests do not find it
        deleted = http.delete("/v1/adapters/esft").json()
        assert deleted.pop("freed")["disk_bytes"] > 0
        assert deleted == {"id": "esft", "object": "adapter", "deleted": True}
        assert http.post("/v1/completions", json=COMPLETION | {"model": "esft"}).status_code == 404
        streamed = "".join(it["choices"][0]["text"] for it in events(lines))
    assert decode(root, expected("esft", 400)).endswith(streamed[-300:])
    assert http.delete("/v1/adapters/late").status_code == 200
    assert http.delete("/v1/adapters/late").status_code == 404
    assert http.delete("/v1/adapters/tiny").status_code == 409
    assert http.post("/v1/adapters", json={"name": "esft", "path": "esft"}).status_code == 201
    settle(server)


def test_the_same_name_with_other_weights_answers_with_the_new_ones(
    http: httpx.Client, root: Path, expected: Callable[[str, int], list[int]]
) -> None:
    for weights in ("late", "other", "late"):
        assert (
            http.post("/v1/adapters", json={"name": "changing", "path": str(root / "more" / weights)}).status_code
            == 201
        )
        body = {"model": "changing", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
        assert http.post("/v1/completions", json=body).json()["choices"][0]["text"] == decode(
            root, expected(weights, 12)
        )
        assert http.delete("/v1/adapters/changing").status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"name": "x", "path": "/etc"}, 400, "outside"),
        ({"name": "x", "path": "a" * 300}, 422, "cannot be read: File name too long"),
        ({"name": "x", "path": "../tiny"}, 400, "outside"),
        ({"name": "x", "path": "nowhere"}, 422, "not a directory"),
        ({"name": "x", "path": "broken"}, 422, "holds no adapter"),
        ({"name": "a/b", "path": "lora"}, 400, "not an adapter name"),
        ({"name": "tiny", "path": "lora"}, 409, "base model"),
        ({"name": "esft", "path": "lora"}, 409, "taken"),
        ({"name": "x"}, 400, "one of path, upload, source says where the adapter is; none is given"),
        ({"name": "x", "path": "lora", "force": True}, 400, "'force' is not a field"),
    ],
)
def test_adapter_refusals(http: httpx.Client, body: dict[str, Any], status: int, says: str) -> None:
    response = http.post("/v1/adapters", json=body)
    assert response.status_code == status and says in response.json()["error"]["message"], response.text


def test_an_adapter_that_does_not_fit_is_refused_with_the_list(http: httpx.Client, root: Path) -> None:
    directory = root / "adapters" / "misfit"
    save_lora(directory, make_model("llama"), 1, ("up_proj",))  # a dense model's
    response = http.post("/v1/adapters", json={"name": "misfit", "path": "misfit"})
    shutil.rmtree(directory)
    error = response.json()["error"]
    assert response.status_code == 422 and error["code"] == "adapter_does_not_fit"
    assert (
        "8 of the adapter's tensors" in error["message"] and "no linear model.layers.0.mlp.up_proj" in error["message"]
    )


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks_and_its_pin(server: LiveServer, stream: bool) -> None:
    body = {"model": "lora", "prompt": PROMPT, "max_tokens": 490, "stream": stream, "n": 4}
    steps = server.stats()["heddle_engine_steps_total"]
    with httpx.Client(base_url=server.url) as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/completions", json=body, timeout=httpx.Timeout(10, read=0.15 if not stream else 0.0001))
    settle(server)
    assert server.stats()["heddle_engine_steps_total"] - steps < 450
