"""Adapters that strangers made, over HTTP and at start: each fails alone, in time, and in words that harm nobody."""

import contextlib
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.adapter_files import NESTED_CONFIG, slow_patterns
from tests.support.live_server import LiveServer, write_tokenizer
from tests.support.tiny_adapters import save_esft, save_lora
from tests.support.tiny_models import make_model, save_model
from tests.support.waiting import eventually

pytestmark = pytest.mark.slow
ESCAPE = "\x1b]0;owned\x07\x1b[31m"
BASE_NAME = "somebody/Original"


def configured(directory: Path, **config: Any) -> Path:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return directory


def hostile(adapters: Path, good: Path, esft: Path) -> dict[str, str]:
    """Directories that once stopped the server, by name, with what their refusal says."""

    def copy(name: str, of: Path = good) -> Path:
        return Path(shutil.copytree(of, adapters / name))

    tensors = load_file(good / "adapter_model.safetensors")
    save_file(tensors | {f"[/x]{ESCAPE}": torch.zeros(1)}, copy("markup-tensor") / "adapter_model.safetensors")
    configured(copy("markup-key"), **{f"[/zz]{ESCAPE}": 1})
    (copy("nested") / "adapter_config.json").write_text(NESTED_CONFIG)
    (copy("digits", esft) / "expert_cfg.json").write_text('{"experts": {"' + "1" * 4500 + '": [0]}}')
    (adapters / "loop").symlink_to(adapters / "loop")
    (adapters / "dangling").symlink_to(adapters / "nothing")
    copy(f"[red]{ESCAPE}")
    copy("a b")
    os.rename(copy("bytes"), os.fsencode(adapters) + b"/\xff\xfe")
    (adapters / "empty").mkdir()
    return {"markup-tensor": "[/x]", "markup-key": "[/zz]", "nested": "rank_pattern", "digits": "plain digits",
            "loop": "is not a directory", "dangling": "is not a directory", "[red]": "is not an adapter name",
            "a b": "is not an adapter name", r"\udcff\udcfe": "is not an adapter name",
            "empty": "holds no adapter"}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("strangers")
    write_tokenizer(save_model(root / "tiny", "qwen3_moe", vocab_size=256))
    model = make_model("qwen3_moe", vocab_size=256)
    declared = {"adapters/good": "org/Tiny", "more/named": BASE_NAME, "more/foreign": "a/B",
                "more/quantised": "unsloth/tiny-bnb-4bit"}  # fmt: skip
    for place, base in declared.items():
        configured(save_lora(root / place, model, 1, ("q_proj",)), base_model_name_or_path=base)
    configured(
        save_lora(root / "more" / "noted", model, 1, ("q_proj",)), lora_nums=2, tool="s3cret", task_type="SEQ_CLS"
    )
    save_esft(root / "more" / "esft", model, 2, {1: [2, 0]})
    configured(save_lora(root / "more" / "slow", model, 1, ("q_proj",)), rank_pattern=slow_patterns(4))
    return root


def start(root: Path, *arguments: str, log: str = "log") -> LiveServer:
    return LiveServer(str(root / "tiny"), "--adapters", str(root / "adapters"), "--adapter-root", str(root / "more"),
                      *arguments, log=root / log).wait_ready()  # fmt: skip


@pytest.fixture(scope="module")
def refusals(root: Path) -> dict[str, str]:
    return hostile(root / "adapters", root / "adapters" / "good", root / "more" / "esft")


@pytest.fixture(scope="module")
def server(root: Path, refusals: dict[str, str]) -> Iterator[LiveServer]:
    server = start(root, "--base-name", BASE_NAME, "--verify-timeout-s", "5")
    yield server
    assert server.stop() == 0, server.output()


@pytest.fixture(scope="module")
def strict(root: Path) -> Iterator[LiveServer]:
    """Another one, with all that may be asked of a server about adapters. It gives nothing up by itself."""
    configured(Path(shutil.copytree(root / "more" / "foreign", root / "strict" / "stranger")))
    shutil.copytree(root / "more" / "noted", root / "strict" / "told")
    server = LiveServer(str(root / "tiny"), "--adapters", str(root / "strict"), "--adapter-root", str(root / "more"),
                        "--strict-base", "--base-name", BASE_NAME, "--ignore-key", "lora_nums", "--ignore-key", "other",
                        "--verify-timeout-s", "300", log=root / "strict-log").wait_ready()  # fmt: skip
    yield server
    server.kill()


@pytest.fixture
def http(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


def post(http: httpx.Client, name: str, path: str | None = None) -> httpx.Response:
    return http.post("/v1/adapters", json={"name": name, "path": path or f"../more/{name}"})


def verifying(server: LiveServer) -> list[psutil.Process]:
    """The processes that verify, those that are ending left out."""
    found = []
    for process in psutil.Process(server.process.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [process] * ("adapters_store.verify" in process.cmdline())
    return found


def spent(server: LiveServer) -> dict[int, float]:
    """Seconds of a processor that each of them has had: at work is whoever has more a little later."""
    found = {}
    for process in verifying(server):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            found[process.pid] = times.user + times.system
    return found


def at_work(server: LiveServer, idle: dict[int, float]) -> set[int]:
    """Of those that were idle after so many seconds of a processor, some tens of milliseconds more."""
    return {pid for pid, seconds in spent(server).items() if seconds > idle.get(pid, seconds) + 0.04}


# -- fails alone ---


def test_at_start_each_bad_directory_is_told_of_and_the_rest_is_served(
    server: LiveServer, http: httpx.Client, refusals: dict[str, str]
) -> None:
    assert [it["id"] for it in http.get("/v1/adapters").json()["data"]][:1] == ["good"]
    output = server.output()
    table = " ".join(output.split())
    for name, says in refusals.items():
        assert name in table and says in table.replace("\n", " "), says
    assert table.count(" refused ") == len(refusals)
    assert "\x1b]0;" not in output and "\x1b[31m" not in output and "\x07" not in output
    assert "Traceback" not in output


@pytest.mark.parametrize("name", ["markup-tensor", "markup-key", "nested", "digits", "loop", "dangling", "empty"])
def test_over_http_it_is_a_422(http: httpx.Client, refusals: dict[str, str], name: str) -> None:
    response = post(http, "x", name)
    assert response.status_code == 422 and refusals[name] in response.json()["error"]["message"], response.text
    assert len(response.content) < 2500 and "\\u001b" not in response.text


@pytest.mark.parametrize("path", ["\udcff", "a\x1b[2J", "x" * 100_000, "[/x]"])
def test_strange_paths_are_refused(http: httpx.Client, path: str) -> None:
    body = json.dumps({"name": "x", "path": path})
    response = http.post("/v1/adapters", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422) and len(response.content) < 2500, response.text


# -- in time ---


def made_idle(http: httpx.Client, server: LiveServer) -> dict[int, float]:
    """A process that verifies is there, and has nothing to do."""
    assert post(http, "named").status_code == 201
    assert http.delete("/v1/adapters/named").status_code == 200
    return spent(server)


def test_others_are_served_while_an_adapter_takes_too_long(server: LiveServer, http: httpx.Client) -> None:
    idle = made_idle(http, server)
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(post(http, "slow")))
    thread.start()
    eventually(lambda: at_work(server, idle))
    num_served = 0
    while not answers:
        assert post(http, "named").status_code == 201
        body = {"model": "named", "prompt": "x", "max_tokens": 2}
        assert http.post("/v1/completions", json=body).status_code == 200
        assert http.delete("/v1/adapters/named").status_code == 200
        num_served += not answers
    assert num_served >= 2
    thread.join()
    error = answers[0].json()["error"]
    assert answers[0].status_code == 422 and "took more than 5 s" in error["message"], error
    assert "--verify-timeout-s" in error["message"]


# -- whose base ---


def test_the_declared_base_is_told_and_a_difference_in_words(server: LiveServer, http: httpx.Client) -> None:
    for name, declared, says in (
        ("named", BASE_NAME, []),
        ("foreign", "a/B", ["trained on 'a/B'; this server's base is known as 'tiny', "]),
        ("quantised", "unsloth/tiny-bnb-4bit", ["trained on 'unsloth/tiny-bnb-4bit'", "names quantised weights"]),
        ("esft", None, []),
    ):
        added = post(http, name).json()
        shown = http.get(f"/v1/adapters/{name}").json()
        listed = next(it for it in http.get("/v1/adapters").json()["data"] if it["id"] == name)
        for answer in (added, shown, listed):
            assert answer["declared_base"] == declared
            assert len(answer["warnings"]) == len(says)
            assert all(part in told for part, told in zip(says, answer["warnings"], strict=True))
        http.delete(f"/v1/adapters/{name}")
    log = server.output()
    assert "adapter foreign: lora, trained on a/B" in log and "adapter good: The adapter says" not in log
    assert "adapter foreign: The adapter says that it was trained on 'a/B'" in log
    assert "trained on org/Tiny" in " ".join(log[log.index("model ") :].split())  # and in the table


def test_strict_base_refuses_with_both_names(strict: LiveServer, root: Path) -> None:
    with httpx.Client(base_url=strict.url, timeout=30) as http:
        for name in ("foreign", "quantised"):
            response = http.post("/v1/adapters", json={"name": name, "path": str(root / "more" / name)})
            message = response.json()["error"]["message"]
            assert response.status_code == 422 and f"known as 'tiny', '{BASE_NAME}'" in message
            assert ("'a/B'" if name == "foreign" else "bnb-4bit") in message and "--base-name" in message
        for name in ("named", "esft"):
            body = {"name": name, "path": str(root / "more" / name)}
            assert http.post("/v1/adapters", json=body).status_code == 201
            assert http.delete(f"/v1/adapters/{name}").status_code == 200
    table = " ".join(strict.output().split())
    assert "stranger refused" in table and "--strict-base" in table


# -- what was understood ---

NOTES = [
    "task_type is 'SEQ_CLS'; the adapter is served as CAUSAL_LM.",
    "adapter_config.json: ignored as asked: lora_nums.",
    "adapter_config.json: unknown keys that hold a text were passed over: tool.",
]


def test_what_was_passed_over_is_told_and_said_once_in_the_log(server: LiveServer, http: httpx.Client) -> None:
    refused = post(http, "noted")
    assert refused.status_code == 422 and "lora_nums = 2 in adapter_config.json is not known" in refused.text
    assert "name it in ignore_keys" in refused.text
    body = {"name": "noted", "path": "../more/noted", "ignore_keys": ["lora_nums"]}
    for status in (201, 200):
        added = http.post("/v1/adapters", json=body)
        assert added.status_code == status and added.json()["notes"] == NOTES
    assert http.get("/v1/adapters/noted").json()["notes"] == NOTES
    assert post(http, "named").json()["notes"] == [] == http.get("/v1/adapters/named").json()["notes"]
    for name in ("noted", "named"):
        http.delete(f"/v1/adapters/{name}")
    log = server.output()
    assert [log.count(f"INFO heddle.adapters: adapter noted: {note}") for note in NOTES] == [1, 1, 1]
    assert "s3cret" not in log


@pytest.mark.parametrize(
    ("keys", "status", "says"),
    [
        (["lora_nums", "use_dora"], 422, "ignore_keys names 'use_dora', which is no unknown key"),
        ("lora_nums", 400, "ignore_keys"), ([1], 400, "ignore_keys"), (["k" * 201], 400, "ignore_keys"),
        (["k"] * 65, 400, "ignore_keys"), (None, 400, "ignore_keys"),
    ],
)  # fmt: skip
def test_keys_that_cannot_be_ignored(http: httpx.Client, keys: Any, status: int, says: str) -> None:
    response = http.post("/v1/adapters", json={"name": "x", "path": "../more/noted", "ignore_keys": keys})
    assert response.status_code == status and says in response.json()["error"]["message"], response.text
    assert len(response.content) < 2500


def test_keys_may_be_ignored_at_start(strict: LiveServer) -> None:
    with httpx.Client(base_url=strict.url, timeout=30) as http:
        assert http.get("/v1/adapters/told").json()["notes"] == NOTES
    assert f"adapter told: {NOTES[1]}" in strict.output()


# -- and not for longer than somebody waits ---


def test_a_client_that_leaves_ends_its_verification(strict: LiveServer) -> None:
    with httpx.Client(base_url=strict.url, timeout=30) as client:
        idle = made_idle(client, strict)
    body = b'{"name": "slow", "path": "../more/slow"}'
    head = f"POST /v1/adapters HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with socket.create_connection(("127.0.0.1", strict.port)) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        eventually(lambda: at_work(strict, idle))
        worked = at_work(strict, idle)
    eventually(lambda: not worked & spent(strict).keys())  # it would have had minutes more


def test_shutdown_does_not_wait_for_a_verification(strict: LiveServer) -> None:
    """The last test that this server is for."""
    answers: list[httpx.Response] = []
    client = httpx.Client(base_url=strict.url, timeout=60)

    def ask() -> None:
        with contextlib.suppress(httpx.HTTPError):
            answers.append(post(client, "slow"))

    threads = [threading.Thread(target=ask) for _ in range(4)]  # two are under way, two wait
    for thread in threads:
        thread.start()
    eventually(lambda: len(verifying(strict)) == 2)
    time.sleep(0.5)
    children = verifying(strict)
    assert strict.stop(signal.SIGTERM, timeout_s=60) == 0, strict.output()
    for thread in threads:
        thread.join()
    client.close()
    assert [it.status_code for it in answers] == [503] * 4
    assert answers[0].json()["error"]["code"] == "shutting_down"
    assert not any(it.is_running() and it.status() != psutil.STATUS_ZOMBIE for it in children)
    assert "Traceback" not in strict.output()
