"""What a name means over time, over HTTP: replaced, rolled back, aliased, uploaded, checked, and kept over a
restart."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.support.live_server import LiveServer
from tests.support.served import PROMPT, decode, events, tiny
from tests.support.tiny_adapters import save_lora

pytestmark = pytest.mark.slow
GREEDY = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}


@pytest.fixture
def http(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client
        for alias in client.get("/v1/aliases").json()["data"]:
            client.delete(f"/v1/aliases/{alias['id']}")
        for adapter in client.get("/v1/adapters").json()["data"]:
            if adapter["id"] not in ("lora", "esft"):
                assert client.delete(f"/v1/adapters/{adapter['id']}").status_code == 200


def put(http: httpx.Client, name: str, path: str, status: int = 200, **fields: Any) -> Any:
    response = http.put(f"/v1/adapters/{name}", json={"path": f"../more/{path}"} | fields)
    assert response.status_code == status, response.text
    return response.json()


def ask(http: httpx.Client, model: str, **fields: Any) -> Any:
    response = http.post("/v1/completions", json=GREEDY | {"model": model} | fields)
    assert response.status_code == 200, response.text
    return response.json()


def text(http: httpx.Client, model: str, **fields: Any) -> str:
    return str(ask(http, model, **fields)["choices"][0]["text"])


def error(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


# -- replaced and rolled back ---


def test_a_stream_ends_on_the_weights_that_it_began_with_while_others_use_the_new(
    http: httpx.Client, root: Path, expected: Callable[[str, int], list[int]]
) -> None:
    first = put(http, "name", "late", 201)["revision"]
    body = {"model": "name", "prompt": PROMPT, "max_tokens": 400, "temperature": 0, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as streaming:
        lines = streaming.iter_lines()
        begun = next(lines)
        told = put(http, "name", "other")
        assert [it["revision"] for it in told["versions"]] == [told["revision"], first]
        assert text(http, "name") == decode(root, expected("other", 12))
        assert text(http, f"name@{first[:10]}") == decode(root, expected("late", 12))
        streamed = json.loads(begun.removeprefix("data: "))["choices"][0]["text"]
        streamed += "".join(it["choices"][0]["text"] for it in events(lines))
    assert streamed == decode(root, expected("late", 400))
    answer = ask(http, "name")
    assert (answer["model"], answer["system_fingerprint"]) == ("name", f"fp_{told['revision'][:16]}")

    back = http.post("/v1/adapters/name/rollback")
    assert back.status_code == 200 and back.json()["revision"] == first
    assert text(http, "name") == decode(root, expected("late", 12))
    again = http.post("/v1/adapters/name/rollback", json={"revision": told["revision"][:8]})
    assert again.json()["revision"] == told["revision"]
    assert text(http, "name") == decode(root, expected("other", 12))
    assert error(http.post("/v1/adapters/name/rollback", json={"revision": "ffff"})) == (409, "adapter_conflict")
    assert error(http.post("/v1/adapters/missing/rollback")) == (404, "adapter_not_found")


def test_who_replaces_may_say_what_he_saw(http: httpx.Client) -> None:
    first = put(http, "name", "late", 201)["revision"]
    refused = http.put("/v1/adapters/name", json={"path": "../more/other"}, headers={"If-Match": '"0000"'})
    assert error(refused) == (412, "revision_changed") and first in refused.text
    done = http.put("/v1/adapters/name", json={"path": "../more/other"}, headers={"If-Match": f'"{first}"'})
    assert done.status_code == 200
    assert error(http.post("/v1/adapters", json={"name": "name", "path": "../more/late"})) == (409, "adapter_conflict")
    assert http.put("/v1/adapters/name", json={"path": "../more/late", "name": "else"}).status_code == 400


def test_deleting_while_a_stream_runs_waits_or_ends_it(http: httpx.Client) -> None:
    put(http, "name", "late", 201)
    body = {"model": "name", "prompt": PROMPT, "max_tokens": 400, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as streaming:
        lines = streaming.iter_lines()
        next(lines)
        freed = http.delete("/v1/adapters/name?drain_s=0").json()["freed"]
        assert freed["disk_bytes"] > 0
        rest = [line for line in lines if line]
        assert "adapter_deleted" in rest[-1] or rest[-1] == "data: [DONE]"  # it may have been done by then
    for query in ("drain_s=-1", "drain_s=x", "drain_s=1&drain_s=2", "drain_s=1e9"):
        assert http.delete(f"/v1/adapters/lora?{query}").status_code == 400
    assert http.get("/v1/adapters/lora").status_code == 200


# -- two names, one set of weights ---


def test_names_of_the_same_weights_share_pages_and_under_one_salt_keys(server: LiveServer, http: httpx.Client) -> None:
    first, second = put(http, "one", "late", 201), put(http, "two", "late", 201)
    assert first["revision"] == second["revision"]
    prompt = PROMPT * 6
    cached = [
        ask(http, model, prompt=prompt, **salt)["usage"]["prompt_tokens_details"]["cached_tokens"]
        for model, salt in (("one", {}), ("two", {}), ("two", {"cache_salt": "a"}), ("one", {"cache_salt": "a"}))
    ]
    assert cached[0] == cached[2] == 0 and cached[1] == cached[3] > 0
    pages = server.stats()["heddle_adapter_bytes_on_device"]
    put(http, "two", "other")
    text(http, "two")
    assert server.stats()["heddle_adapter_bytes_on_device"] > pages


# -- aliases ---


def test_an_alias_is_a_model_like_any_other(http: httpx.Client, client: openai.OpenAI) -> None:
    put(http, "v1", "late", 201), put(http, "v2", "other", 201)
    body = {"alias": "support", "targets": [{"model": "v1", "weight": 0.5}, {"model": "v2", "weight": 0.5}]}
    assert http.put("/v1/aliases/support", json=body).status_code == 201
    models = {ask(http, "support", user=str(user), max_tokens=1)["model"] for user in range(20)}
    assert models == {"v1", "v2"}
    mine = {client.completions.create(model="support", prompt="x", max_tokens=1, user="me").model for _ in range(5)}
    assert len(mine) == 1
    assert "support" in {model.id for model in client.models.list()}
    assert client.models.retrieve("support").id == "support"
    assert http.get("/v1/aliases/support").json()["targets"][0] == {"model": "v1", "weight": 0.5}
    assert http.put("/v1/aliases/support", json={"targets": [{"model": "v2"}]}).status_code == 200
    assert ask(http, "support")["model"] == "v2"
    assert error(http.delete("/v1/adapters/v2")) == (409, "adapter_conflict")
    assert http.delete("/v1/aliases/support").status_code == 200
    assert error(http.delete("/v1/aliases/support")) == (404, "adapter_not_found")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"targets": []}, 400), ({}, 400), ({"targets": [{"model": "missing"}]}, 404), ({"targets": "lora"}, 400),
        ({"targets": [{"model": "lora", "weight": -1}]}, 400), ({"targets": [{"model": "lora", "weight": 0}]}, 400),
        ({"targets": [{"model": "lora", "more": 1}]}, 400), ({"targets": [{"model": "lora"}] * 2}, 400),
        ({"alias": "another", "targets": [{"model": "lora"}]}, 400),
    ],
)  # fmt: skip
def test_aliases_that_are_refused(http: httpx.Client, body: dict[str, Any], status: int) -> None:
    response = http.put("/v1/aliases/alias", json=body)
    assert response.status_code == status, response.text
    assert http.get("/v1/aliases").json()["data"] == []


# -- what a manifest says ---


def test_a_manifest_is_shown_and_kept(
    http: httpx.Client, root: Path, expected: Callable[[str, int], list[int]]
) -> None:
    manifest = {"description": "greedy", "sampling": {"temperature": 0, "max_tokens": 7}, "max_concurrent": 2}
    put(http, "name", "late", 201, manifest=manifest)
    assert http.get("/v1/adapters/name").json()["manifest"] == manifest
    said = http.post("/v1/completions", json={"model": "name", "prompt": PROMPT}).json()
    assert said["choices"][0]["text"] == decode(root, expected("late", 7)) and said["usage"]["completion_tokens"] == 7
    three = http.post("/v1/completions", json={"model": "name", "prompt": PROMPT, "n": 3, "temperature": 1})
    assert three.status_code == 400 and "allows 2 at once" in three.text  # they never could be served
    body = {"model": "name", "prompt": PROMPT, "n": 2, "temperature": 0, "max_tokens": 400, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as streaming:
        lines = streaming.iter_lines()
        next(lines)
        busy = http.post("/v1/completions", json={"model": "name", "prompt": PROMPT})
        assert error(busy) == (429, "adapter_busy") and "allows 2 at once" in busy.text
    template = "{% for message in messages %}[{{ message.content }}]{% endfor %}"
    put(http, "name", "late", manifest={"chat_template": template})
    chat = {"model": "name", "messages": [{"role": "user", "content": "abc"}], "max_tokens": 4}
    assert http.post("/v1/chat/completions", json=chat).json()["usage"]["prompt_tokens"] == len("[abc]")
    chat["model"] = "lora"
    assert http.post("/v1/chat/completions", json=chat).json()["usage"]["prompt_tokens"] == len("user: abc\nassistant:")


@pytest.mark.parametrize(
    "manifest",
    [
        {"unknown": 1}, {"weight": 0}, {"weight": "1"}, {"sampling": {"temperature": 3}}, {"stop": ["a"] * 5},
        {"priority": 1.5}, {"expires_at": 1}, {"base_id": "sha256:0"}, {"base_id": "sha256:" + "0" * 64},
        {"chat_template": "{% for x in %}"}, {"max_concurrent": 0}, {"description": "x" * 2001},
    ],
)  # fmt: skip
def test_manifests_that_are_refused(http: httpx.Client, manifest: dict[str, Any]) -> None:
    body = json.dumps({"name": "name", "path": "../more/late", "manifest": manifest})
    response = http.post("/v1/adapters", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 422, response.text
    assert len(response.content) < 2500 and http.get("/v1/adapters/name").status_code == 404


@pytest.mark.parametrize("manifest", [{"description": "\ud800"}, {"stop": ["\udfff"]}])
def test_manifests_that_are_no_text_are_refused_with_the_body(http: httpx.Client, manifest: dict[str, Any]) -> None:
    body = json.dumps({"name": "name", "path": "../more/late", "manifest": manifest})
    response = http.post("/v1/adapters", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["param"] == "manifest"
    assert http.get("/v1/adapters/name").status_code == 404


# -- uploads ---


def test_an_adapter_may_be_sent_as_a_form(
    http: httpx.Client, root: Path, expected: Callable[[str, int], list[int]]
) -> None:
    def form() -> list[tuple[str, Any]]:
        names = ("adapter_config.json", "adapter_model.safetensors")
        return [("files", (name, (root / "more" / "late" / name).read_bytes())) for name in names]

    fields = {"name": "sent", "manifest": json.dumps({"description": "sent"})}
    added = http.post("/v1/adapters", data=fields, files=form())
    assert added.status_code == 201, added.text
    assert (added.json()["root"], added.json()["manifest"]) == ("upload", {"description": "sent"})
    assert text(http, "sent") == decode(root, expected("late", 12))
    same = http.put("/v1/adapters/sent", data={"manifest": json.dumps({"description": "sent"})}, files=form())
    assert same.status_code == 200
    assert http.post("/v1/adapters", data={"name": "sent", "verify": "1"}, files=form()).status_code == 400
    assert http.post("/v1/adapters", data={"name": "no name"}, files=form()).status_code == 400


def test_an_upload_goes_on_where_it_broke_off(
    http: httpx.Client, root: Path, expected: Callable[[str, int], list[int]]
) -> None:
    upload = http.post("/v1/uploads").json()["id"]
    weights = (root / "more" / "other" / "adapter_model.safetensors").read_bytes()
    file = f"/v1/uploads/{upload}/files/adapter_model.safetensors"
    assert http.put(file, content=weights[:1000]).status_code == 204
    offset = int(http.head(file).headers["Upload-Offset"])
    assert offset == 1000
    named = {"name": "sent", "upload": upload}
    assert http.post("/v1/adapters", json=named).status_code == 422  # and may be mended
    assert http.patch(file, content=weights[offset:], headers={"Upload-Offset": str(offset)}).status_code == 204
    config = (root / "more" / "other" / "adapter_config.json").read_bytes()
    assert http.put(f"/v1/uploads/{upload}/files/adapter_config.json", content=config).status_code == 204
    assert http.post("/v1/adapters", json=named).status_code == 201
    assert text(http, "sent") == decode(root, expected("other", 12))
    assert http.get(f"/v1/uploads/{upload}").status_code == 404
    assert error(http.post("/v1/adapters", json=named | {"name": "b"})) == (404, "upload_not_found")


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"name": "x"}, (400, "invalid_value")), ({"name": "x", "path": "lora", "upload": "y"}, (400, "invalid_value")),
        ({"name": "x", "source": "hub:org/name"}, (400, "source_not_allowed")),
        ({"path": "lora"}, (400, "invalid_value")),
    ],
)  # fmt: skip
def test_an_adapter_is_in_one_place(http: httpx.Client, body: dict[str, Any], told: tuple[int, str]) -> None:
    assert error(http.post("/v1/adapters", json=body)) == told


# -- compared with merged weights ---


def test_an_adapter_is_compared_with_merged_weights_before_it_counts(http: httpx.Client) -> None:
    told = put(http, "name", "late", 201, verify=True)
    assert 0 <= told["parity"]["max_difference"] < 1e-3 * told["parity"]["max_logit"] and told["state"] == "ready"
    checked = http.post("/v1/adapters/esft/verify").json()
    assert checked["parity"]["num_tokens"] > 0 and checked["fault"] is None
    assert http.get("/v1/adapters/name").json()["parity"] == told["parity"]


# -- pages, log, collection ---


@pytest.mark.parametrize(
    ("method", "route"),
    [
        ("DELETE", "/v1/adapters/lora?drain=5"), ("GET", "/v1/adapters?limit=5&ater=a"),
        ("POST", "/v1/store/gc?keep=2"), ("GET", "/v1/store/log?since=3"),
    ],
)  # fmt: skip
def test_a_word_of_the_query_that_would_change_nothing_is_refused(http: httpx.Client, method: str, route: str) -> None:
    response = http.request(method, route)
    assert response.status_code == 400 and response.json()["error"]["code"] == "unknown_parameter", response.text
    assert http.get("/v1/adapters/lora").status_code == 200


@pytest.mark.parametrize("condition", ["", '""', "*", "n", '"ab"', "nothing"])
def test_a_condition_that_names_no_revision_is_refused(http: httpx.Client, condition: str) -> None:
    """An empty one is a script's variable that was never set: it must not replace whatever is there."""
    response = http.put("/v1/adapters/name", json={"path": "../more/other"}, headers={"If-Match": condition})
    assert response.status_code == 400 and response.json()["error"]["param"] == "If-Match", response.text
    assert http.get("/v1/adapters/name").status_code == 404


def test_the_list_comes_in_pages(http: httpx.Client) -> None:
    for name in ("a1", "a2", "a3"):
        put(http, name, "late", 201)
    first = http.get("/v1/adapters?limit=2").json()
    assert [it["id"] for it in first["data"]] == ["a1", "a2"] and first["has_more"] and first["total"] == 5
    rest = http.get(f"/v1/adapters?limit=3&after={first['last_id']}").json()
    assert [it["id"] for it in rest["data"]] == ["a3", "esft", "lora"] and not rest["has_more"]
    for query in ("limit=0", "limit=1001", "limit=x", "limit="):
        assert http.get(f"/v1/adapters?{query}").status_code == 400


def test_what_happened_is_in_the_log(http: httpx.Client) -> None:
    lines = http.get("/v1/store/log?limit=1000").json()["data"]
    last = lines[-1]["id"] if lines else 0
    put(http, "name", "late", 201), put(http, "name", "other")
    http.post("/v1/adapters/name/rollback")
    for number in range(7):
        put(http, "name", "late" if number % 2 else "other")
    assert http.post("/v1/store/gc").json()["revisions"] == 0
    http.delete("/v1/adapters/name")
    told = http.get(f"/v1/store/log?after={last}").json()["data"]
    assert [it["action"] for it in told][:3] == ["register", "replace", "rollback"] and told[-1]["action"] == "delete"
    assert {it["actor"] for it in told} == {"127.0.0.1"} and {it["name"] for it in told} == {"name"}


# -- many at once ---


def test_of_many_who_replace_at_once_each_answer_is_one_of_the_two_whole(
    http: httpx.Client, server: LiveServer, root: Path, expected: Callable[[str, int], list[int]]
) -> None:
    put(http, "name", "late", 201)
    texts, done = list[str](), threading.Event()

    def client() -> None:
        with httpx.Client(base_url=server.url, timeout=60) as mine:
            while not done.is_set():
                texts.append(text(mine, "name"))

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for number in range(12):
            put(http, "name", "late" if number % 2 else "other")
            assert text(http, "name") == decode(root, expected("late" if number % 2 else "other", 12))
    finally:
        done.set()
        for thread in threads:
            thread.join(30)
    assert set(texts) <= {decode(root, expected("late", 12)), decode(root, expected("other", 12))} and len(texts) > 8


# -- restarts ---


def test_a_restart_brings_back_what_was_acknowledged(root: Path, tmp_path: Path) -> None:
    def start(number: int) -> LiveServer:
        arguments = ("--adapters", str(root / "adapters"), "--adapter-root", str(root / "more"))
        return LiveServer(str(root / "tiny"), *arguments, "--store", str(tmp_path / "store"),
                          log=tmp_path / f"log{number}").wait_ready()  # fmt: skip

    save_lora(tmp_path / "mine", tiny(), 9, ("q_proj",))
    server = start(0)
    with httpx.Client(base_url=server.url, timeout=60) as http:
        put(http, "kept", "late", 201, manifest={"description": "kept"})
        put(http, "kept", "other")
        http.put("/v1/aliases/alias", json={"targets": [{"model": "kept"}]})
        before = http.get("/v1/adapters/kept").json() | {"device": None}
        answer = text(http, "alias")
    server.kill()  # -9
    server = start(1)
    with httpx.Client(base_url=server.url, timeout=60) as http:
        assert http.get("/v1/adapters/kept").json() | {"device": None} == before
        assert text(http, "alias") == answer == text(http, "kept")
        listed = {it["id"]: it["durable"] for it in http.get("/v1/adapters").json()["data"]}
        assert listed == {"kept": True, "lora": False, "esft": False}
        second = start(2)  # while the first has the store
        with httpx.Client(base_url=second.url, timeout=60) as other:
            assert {it["id"] for it in other.get("/v1/adapters").json()["data"]} == {"lora", "esft"}
            assert put(other, "mine", "late", 201)["durable"] is False
        assert second.stop() == 0 and "in use by another server" in second.output()
    assert server.stop() == 0
    assert "Traceback" not in server.output() + second.output()
