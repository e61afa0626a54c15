"""What there is around generation: the list of models, routes that are none, limits, metrics, the console."""

from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.support.live_server import LiveServer
from tests.support.served import COMPLETION

pytestmark = pytest.mark.slow


def test_models_list_base_and_adapters(client: openai.OpenAI) -> None:
    models = {model.id: model.model_dump() for model in client.models.list()}
    assert set(models) == {"tiny", "lora", "esft"}
    assert models["tiny"]["parent"] is None and models["tiny"]["root"] == "tiny"
    assert models["lora"]["parent"] == "tiny" and models["lora"]["root"] == "lora"
    assert client.models.retrieve("esft").id == "esft"


def test_unknown_routes_and_methods_answer_in_the_same_shape(http: httpx.Client) -> None:
    for method, path, status in (("GET", "/nope", 404), ("GET", "/v1/completions", 405), ("GET", "//v1/models", 404),
                                 ("GET", "/v1/models/nope", 404), ("GET", "/v1/adapters/nope", 404)):  # fmt: skip
        response = http.request(method, path)
        assert response.status_code == status and set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_refused_method_names_all_that_the_path_takes(http: httpx.Client) -> None:
    for path, methods in (("/v1/adapters", "GET, POST"), ("/v1/adapters/x", "DELETE, GET, PUT"),
                          ("/v1/uploads/x/files/y", "HEAD, PATCH, PUT"), ("/version", "GET")):  # fmt: skip
        response = http.options(path)
        assert (response.status_code, response.headers["allow"]) == (405, methods)


def test_the_log_is_read_from_behind_any_line(http: httpx.Client) -> None:
    """Also from behind one whose number no float has."""
    for after, status in ((2**63 - 1, 200), (2**63, 400), (-1, 400), ("1.0", 400), ("1e3", 400), ("x", 400)):
        response = http.get("/v1/store/log", params={"after": after})
        assert response.status_code == status, after
        assert status == 200 or "a whole number from 0 to 9,223,372,036,854,775,807" in response.text


def test_limits_on_the_body(http: httpx.Client) -> None:
    too_long = http.post("/v1/completions", content=b" " * (3 << 20))
    assert too_long.status_code == 413 and "2,097,152" in too_long.json()["error"]["message"]

    def chunks() -> Iterator[bytes]:
        for _ in range(8):
            yield b" " * (1 << 19)

    headers = {"Content-Type": "application/json"}
    assert http.post("/v1/completions", content=chunks(), headers=headers).status_code == 413
    zipped = http.post("/v1/completions", content=b"x", headers={"Content-Encoding": "gzip"})
    assert zipped.status_code == 415


def test_metrics_count_by_model(http: httpx.Client) -> None:
    http.post("/v1/completions", json=COMPLETION | {"max_tokens": 3, "model": "lora"})
    text = http.get("/metrics").text
    assert 'heddle_requests_total{finish="length",model="lora"}' in text
    assert 'heddle_time_to_first_token_seconds_count{model="lora"}' in text
    assert "heddle_engine_up 1.0" in text


def test_the_console_says_what_is_served(server: LiveServer) -> None:
    output = " ".join(server.output().split())
    assert "base (qwen3_moe)" in output and "broken refused" in output and "curl http://127.0.0.1" in output
