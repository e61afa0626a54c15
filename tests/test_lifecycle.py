"""Starts, ends and deaths of the two processes, with real signals."""

import http.client
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from server.exits import EXIT_FAILED, EXIT_STOPPED_EARLY
from tests.support.live_server import LiveServer, write_tokenizer
from tests.support.tiny_models import save_model
from tests.support.waiting import eventually

pytestmark = pytest.mark.slow
LONG = {"model": "tiny", "prompt": "x", "max_tokens": 500, "stream": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("lifecycle") / "tiny"
    # wide enough that 500 tokens take seconds
    write_tokenizer(save_model(directory, "llama", vocab_size=256, hidden_size=512, intermediate_size=2048,
                               num_hidden_layers=6, max_position_embeddings=1024))  # fmt: skip
    return directory


@pytest.fixture
def server(model: Path, tmp_path: Path) -> Iterator[LiveServer]:
    server = LiveServer(str(model), log=tmp_path / "log").wait_ready()
    yield server
    server.kill()


@contextmanager
def streaming(server: LiveServer) -> Iterator[Iterator[str]]:
    """A stream that has begun."""
    with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=60) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: {")
        yield lines


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_the_death_of_the_engine_is_told_and_ends_the_server(server: LiveServer) -> None:
    with streaming(server) as lines:
        server.engine.kill()  # -9
        rest = [line for line in lines if line]
    assert '"error"' in rest[-1] and "killed by signal 9" in rest[-1] and "engine_dead" in rest[-1]
    assert "data: [DONE]" not in rest
    refused = httpx.post(f"{server.url}/v1/completions", json=LONG | {"stream": False})
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "engine_dead"
    assert "Retry-After" in refused.headers
    health = httpx.get(f"{server.url}/health")
    assert health.status_code == 503 and health.json()["status"] == "engine_dead"
    assert "heddle_engine_up 0.0" in httpx.get(f"{server.url}/metrics").text
    assert server.process.wait(60) == EXIT_FAILED
    assert "Traceback" not in server.output()


def test_ctrl_c_lets_a_short_answer_finish_and_leaves_nothing_behind(server: LiveServer) -> None:
    engine = server.engine.pid
    with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG | {"max_tokens": 40}, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        os.kill(server.process.pid, signal.SIGINT)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert server.process.wait(60) == 0
    eventually(lambda: gone(engine))
    assert "Traceback" not in server.output()


def test_a_stream_that_outlasts_the_drain_ends_with_an_error_event(server: LiveServer) -> None:
    with streaming(server) as lines:
        server.engine.suspend()  # it will not finish in time
        os.kill(server.process.pid, signal.SIGTERM)
        time.sleep(0.5)
        refused = httpx.post(f"{server.url}/v1/completions", json=LONG)
        assert refused.status_code == 503 and "shutting down" in refused.json()["error"]["message"]
        assert httpx.get(f"{server.url}/health").json() == {"status": "shutting_down"}
        rest = [line for line in lines if line]
    assert '"error"' in rest[-1] and "shutting down" in rest[-1]
    assert server.process.wait(60) == 0  # the suspended engine was killed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_loading_ends_both_processes(model: Path, tmp_path: Path, number: int) -> None:
    server = LiveServer(str(model), log=tmp_path / "log")
    eventually(psutil.Process(server.process.pid).children)
    children = psutil.Process(server.process.pid).children()
    assert server.stop(number) == EXIT_STOPPED_EARLY
    eventually(lambda: gone(children[0].pid))
    assert "Traceback" not in server.output()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_an_idle_server_ends_at_once(model: Path, tmp_path: Path, number: int) -> None:
    server = LiveServer(str(model), "--drain-s", "100", log=tmp_path / "log").wait_ready()
    assert server.stop(number, timeout_s=50) == 0


def test_an_engine_whose_front_is_killed_ends_by_itself(server: LiveServer) -> None:
    engine = server.engine.pid
    server.process.kill()
    server.process.wait()
    eventually(lambda: gone(engine))


@pytest.mark.alone
def test_a_stuck_engine_turns_health_unhealthy_and_new_work_away(model: Path, tmp_path: Path) -> None:
    """Silence, not death: the process is there and says nothing."""
    server = LiveServer(str(model), "--engine-silence-s", "1", log=tmp_path / "log").wait_ready()
    try:
        server.engine.suspend()
        eventually(lambda: httpx.get(f"{server.url}/health").status_code == 503)
        assert httpx.get(f"{server.url}/health").json()["status"] == "engine_silent"
        start = time.monotonic()
        refused = httpx.post(f"{server.url}/v1/completions", json=LONG)
        assert time.monotonic() - start < 10
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "engine_silent"
        server.engine.resume()
        eventually(lambda: httpx.get(f"{server.url}/health").status_code == 200)
    finally:
        server.stop()


@pytest.mark.alone
def test_an_engine_that_stays_silent_ends_the_server(model: Path, tmp_path: Path) -> None:
    options = ("--engine-silence-s", "1", "--engine-silence-exit-s", "2")
    server = LiveServer(str(model), *options, log=tmp_path / "log").wait_ready()
    engine = server.engine
    try:
        with streaming(server) as lines:
            engine.suspend()
            rest = [line for line in lines if line]
        assert "has said nothing for" in rest[-1] and "engine_dead" in rest[-1]
        assert server.process.wait(60) == EXIT_FAILED
        eventually(lambda: gone(engine.pid))
    finally:
        server.kill()


@pytest.mark.alone
def test_a_front_that_was_stopped_itself_does_not_take_the_engine_for_silent(model: Path, tmp_path: Path) -> None:
    options = ("--engine-silence-s", "1", "--engine-silence-exit-s", "2")
    server = LiveServer(str(model), *options, log=tmp_path / "log").wait_ready()
    try:
        server.process.send_signal(signal.SIGSTOP)
        time.sleep(4)
        server.process.send_signal(signal.SIGCONT)
        time.sleep(3)
        assert httpx.get(f"{server.url}/health").status_code == 200
    finally:
        assert server.stop() == 0


@pytest.mark.alone
def test_four_hundred_silent_sockets_keep_nobody_out(model: Path, tmp_path: Path) -> None:
    server = LiveServer(str(model), log=tmp_path / "log", open_files=256).wait_ready()
    silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(400)]
    try:
        took = []
        for _ in range(5):
            start = time.monotonic()
            with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)) as connection:
                connection.request("GET", "/health")
                assert connection.getresponse().status == 200
            took.append(time.monotonic() - start)
        assert sorted(took)[2] < 0.1, took
        assert "128 connections at once instead of 2048" in server.output() and len(server.output()) < 20_000
    finally:
        for socket_ in silent:
            socket_.close()
        assert server.stop() == 0


@pytest.mark.alone
def test_one_request_of_very_many_sequences_does_not_keep_others_waiting(server: LiveServer) -> None:
    many = {"model": "tiny", "prompt": ["a"] * 64, "n": 2, "max_tokens": 1000, "temperature": 2}
    too_many = httpx.post(f"{server.url}/v1/completions", json=many | {"n": 16})
    assert too_many.status_code == 400 and "1,024 completions in one request" in too_many.json()["error"]["message"]
    with httpx.Client(base_url=server.url, timeout=60) as hog, ThreadPoolExecutor() as pool:
        pool.submit(lambda: hog.send(hog.build_request("POST", "/v1/completions", json=many), stream=True))
        while server.stats()["heddle_requests_running"] < 128:
            time.sleep(0.05)
        waits = []
        for _ in range(5):
            steps = server.stats()["heddle_engine_steps_total"]
            small = {"model": "tiny", "prompt": "b", "max_tokens": 1, "temperature": 0}
            assert httpx.post(f"{server.url}/v1/completions", json=small, timeout=30).status_code == 200
            waits.append(server.stats()["heddle_engine_steps_total"] - steps)
        assert server.stats()["heddle_requests_running"] > 100  # the many go on
        # two steps after the one under way, and what passes while the metrics are asked
        assert sorted(waits)[2] <= 5, waits
        server.kill()
