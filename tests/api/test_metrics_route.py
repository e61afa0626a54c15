"""GET /metrics while clients ask through more adapters than have series, or room on the device."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.adapter_files import lora
from tests.support.fake_server import SLOTS, FakeServer
from tests.support.scrape import Scrape, scraped

NAMES = [f"adapter-{index}" for index in range(6)]
SUMMED = ("heddle_requests_total", "heddle_generated_tokens_total", "heddle_inter_token_seconds_count",
          "heddle_queue_seconds_count", "heddle_adapter_loads_total", "heddle_adapter_evictions_total")  # fmt: skip


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    with FakeServer(tmp_path, metrics_adapters=2).running() as it:
        for name in NAMES:
            lora(tmp_path / name)
            assert httpx.post(f"{it.url}/v1/adapters", json={"name": name, "path": name}).status_code == 201
        yield it


def scrape(http: httpx.Client) -> Scrape:
    answer = http.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return scraped(answer.text)


def check(series: Scrape) -> list[str]:
    """What holds at every moment. Returns what the endpoint picker takes to be on the device."""
    ((told, value),) = series.of("vllm:lora_requests_info")
    running = [it for it in told["running_lora_adapters"].split(",") if it]
    waiting = [it for it in told["waiting_lora_adapters"].split(",") if it]
    assert told["max_lora"] == str(SLOTS) and abs(value - time.time()) < 5
    assert running == sorted(running) and waiting == sorted(waiting) and not set(running) & set(waiting)
    assert len(running) <= SLOTS and set(running + waiting) <= set(NAMES)
    for name in ("num_requests_running", "num_requests_waiting", "cache_config_info"):
        series.one(f"vllm:{name}")
    assert 0 <= series.one("vllm:kv_cache_usage_perc") <= 1
    assert series.values("heddle_prompt_tokens_total", "model") <= {"tiny", "other", *NAMES}
    assert len(series.values("heddle_prompt_tokens_total", "model")) <= 2 + 2
    return running


def test_under_load(server: FakeServer) -> None:
    is_over = threading.Event()

    def client(number: int) -> None:
        with httpx.Client(base_url=server.url, timeout=20) as http:
            while not is_over.is_set():
                number += 1
                model = [*NAMES, "tiny"][number % 7]
                body = {"model": model, "prompt": "x", "max_tokens": 20, "stream": number % 2 == 0}
                assert http.post("/v1/completions", json=body).status_code == 200

    clients = [threading.Thread(target=client, args=(number * 3,)) for number in range(5)]
    seen = set[str]()
    with httpx.Client(base_url=server.url, timeout=20) as http:
        before = scrape(http)
        for it in clients:
            it.start()
        try:
            begin = time.monotonic()
            while time.monotonic() < begin + 2 or (seen != set(NAMES) and time.monotonic() < begin + 60):
                now = scrape(http)
                seen.update(check(now))
                assert all(now.sum(name) >= before.sum(name) for name in SUMMED)
                before = now
        finally:
            is_over.set()
            for it in clients:
                it.join()
        last = scrape(http)
        assert seen == set(NAMES)
        finished = last.sum("heddle_requests_total", finish="length")
        assert finished == last.sum("heddle_requests_total") == last.sum("heddle_queue_seconds_count") > 20
        assert last.sum("heddle_generated_tokens_total") == 20 * finished
        assert last.sum("heddle_inter_token_seconds_count") == 19 * finished
        loads, evictions = last.sum("heddle_adapter_loads_total"), last.sum("heddle_adapter_evictions_total")
        assert loads >= 6 and loads - SLOTS <= evictions <= loads
        assert last.one("heddle_adapter_bytes_on_device") == SLOTS * server.residency.BYTES_EACH
