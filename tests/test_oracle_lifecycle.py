"""The oracle while adapters change: replaced, rolled back, evicted and loaded again, under several names, by alias.

Whatever happens to adapters meanwhile, each answer is that of one revision, whole: the one that its model's name meant
when the request came. The references are computed by Transformers on merged weights, float32 on the CPU.
"""

import random
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import NamedTuple

import httpx
import pytest

from adapters_store.ref import AdapterRef
from adapters_store.rules import Rules
from server.engine.request import FinishReason
from server.model.probe import PROBE
from tests.support.breadth import always
from tests.support.engine_harness import Engine
from tests.support.live_server import LiveServer, write_tokenizer
from tests.support.served import PROMPT, VOCAB, decode, events, settle, tiny
from tests.support.tiny_adapters import ATTENTION, merge, register, save_esft, save_lora
from tests.support.tiny_models import make_model, reference, save_model

ADAPTERS = ("one", "two", "three", "esft")
SHORT, LONG = 16, 900


def save_adapters(root: Path, vocab: int) -> list[Path]:
    model = make_model("qwen3_moe", vocab_size=vocab)
    loras = [save_lora(root / name, model, seed, ATTENTION, rank=4 * seed) for seed, name in enumerate(ADAPTERS[:3], 1)]
    return [*loras, save_esft(root / ADAPTERS[3], model, 4, {1: [2, 0], 3: [5]})]


# -- in the test's own process -----------------------------------------------------------


def test_conversations_outlive_their_adapters_evictions(tmp_path: Path) -> None:
    """Four adapters, two slots, turns of long answers: whoever speaks again has been evicted since, and what is cached
    of the conversation is still its own."""
    engine = Engine(make_model("qwen3_moe", attention=PROBE), adapter_slots=2)
    entries = [register(engine, path) for path in save_adapters(tmp_path, 199)]
    merged = {entry.ref: merge(make_model("qwen3_moe"), entry) for entry in entries}
    rng = random.Random(4)
    said = {entry.ref: [rng.randrange(3, 199) for _ in range(9)] for entry in entries}
    loaded: Counter[AdapterRef] = Counter()
    on_device: set[AdapterRef] = set()

    def watch(_: int) -> None:
        nonlocal on_device
        now = {it.ref for it in engine.residency.report() if it.state == "resident"}
        loaded.update(now - on_device)
        on_device = now

    for _ in range(4):
        turns = {ref: engine.add(prompt, 24, ref) for ref, prompt in said.items()}
        engine.run(watch)
        for ref, answer in turns.items():
            assert answer.tokens == reference(merged[ref], answer.prompt, 24)
            said[ref] = [*answer.prompt, *answer.tokens, *(rng.randrange(3, 199) for _ in range(3))]
    assert min(loaded.values()) >= 3 and engine.kv_cache.num_prefix_hits > 0


def test_conversations_outlive_memory_that_goes_back_and_forth(tmp_path: Path) -> None:
    """KV blocks and adapters in one budget that has room for neither: long turns of few adapters and short turns of
    many take it from each other, and conversations go on after both have lost theirs."""
    engine = Engine(make_model("qwen3_moe", attention=PROBE), memory_budget=1 << 21, kv_cache_bytes=0, adapter_bytes=0,
                    adapter_slots=0, host_cache_bytes=4 << 20, max_running=24)  # fmt: skip
    model = make_model("qwen3_moe")
    paths = [save_lora(tmp_path / f"l{seed}", model, seed, ATTENTION, rank=40 + seed) for seed in range(8)]
    paths += [save_esft(tmp_path / f"e{seed}", model, seed, {1: [2, 0, 4], 3: [5, 1]}) for seed in range(4)]
    entries = [register(engine, path) for path in paths]
    merged = {entry.ref: merge(make_model("qwen3_moe"), entry) for entry in entries}
    rng = random.Random(4)
    said = {entry.ref: [rng.randrange(3, 199) for _ in range(9)] for entry in entries}
    seen = Counter[str]()
    share = engine.residency._pool.share
    kv = next(it for it in share.budget.shares if it is not share)
    before = kv.used

    def watch(_: int) -> None:
        nonlocal before
        seen["extents given up"] += kv.used < before
        seen["blocks beyond their floor"] += kv.used > kv.floor
        seen["adapters where blocks could be"] += share.used > share.budget.total - kv.cap
        seen["evictions"] += sum(moved.was_evicted for moved in engine.moved)
        engine.moved.clear()
        before = kv.used

    def turn(refs: list[AdapterRef], num_tokens: int) -> None:
        answers = {ref: engine.add(said[ref], num_tokens, ref) for ref in refs}
        engine.run(watch)
        for ref, answer in answers.items():
            assert answer.tokens == reference(merged[ref], answer.prompt, num_tokens)
            said[ref] = [*answer.prompt, *answer.tokens, *(rng.randrange(3, 199) for _ in range(3))]

    refs = [entry.ref for entry in entries]
    for _ in range(2):
        turn(rng.sample(refs, 4), 130)
        turn(refs, 6)
    assert min(seen.values()) > 0 and len(seen) == 4, seen
    assert engine.kv_cache.num_prefix_hits > 0


@pytest.mark.parametrize("slots", always([1, 2], 1))
def test_cancels_among_alternating_adapters_change_nobody_elses_tokens(slots: int, tmp_path: Path) -> None:
    """One request after another through the other adapter, and cancels at every stage: waiting, while the adapter
    loads, in mid-prompt, in mid-answer. (vLLM's issue 38606 has this shape.)"""
    engine = Engine(make_model("qwen3_moe", attention=PROBE), adapter_slots=slots)
    entries = [register(engine, path) for path in save_adapters(tmp_path, 199)[:2]]
    merged = {entry.ref: merge(make_model("qwen3_moe"), entry) for entry in entries}
    rng = random.Random(slots)
    shared = [rng.randrange(3, 199) for _ in range(10)]
    begun, stages = set(), Counter[str]()

    def between(step: int) -> None:
        if step < 60:
            tail = [rng.randrange(3, 199) for _ in range(rng.randrange(1, 12))]
            begun.add(engine.add(shared + tail, 10, entries[step % 2].ref))
        alive = [it for it in begun if it.finish is None and engine.request(it) is not None]
        if alive and step % 3 == 1:
            victim = rng.choice(alive)
            stages["answer" if victim.tokens else "before"] += 1
            engine.abort(victim)

    engine.run(between)
    assert min(stages["answer"], stages["before"]) > 0
    finished = [it for it in engine.answers.values() if it.finish is FinishReason.LENGTH]
    assert len(finished) > 20
    for answer in finished:
        assert answer.adapter is not None and answer.tokens == reference(merged[answer.adapter], answer.prompt, 10)
    assert engine.kv_cache.pool.num_free == engine.kv_cache.pool.num_blocks


# -- through a whole server -----------------------------------------------------------


class Expected(NamedTuple):
    """Of one adapter: its revision and its greedy text after PROMPT."""

    revision: str
    short: str
    long: str


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("changing")
    write_tokenizer(save_model(root / "tiny", "qwen3_moe", vocab_size=VOCAB, max_position_embeddings=2048))
    save_adapters(root / "adapters", VOCAB)
    return root


@pytest.fixture(scope="module")
def expected(root: Path) -> dict[str, Expected]:
    rules = Rules(Engine(tiny()).assembly.info.base, (root / "adapters",))
    found = {}
    for name in ADAPTERS:
        entry = rules.read(name, str(root / "adapters" / name))
        tokens = reference(merge(tiny(), entry), PROMPT, LONG if entry.ref.name == "three" else SHORT)
        found[name] = Expected(entry.ref.revision, decode(root, tokens[:SHORT]), decode(root, tokens))
    assert len({it.short for it in found.values()}) == len(found)
    return found


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[LiveServer]:
    server = LiveServer(str(root / "tiny"), "--adapter-root", str(root / "adapters"), "--store", str(root / "store"),
                        "--adapter-slots", "2", log=root / "log").wait_ready()  # fmt: skip
    yield server
    assert server.stop() == 0, server.output()


@pytest.fixture
def http(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client
    settle(server)


def body(model: str, max_tokens: int = SHORT, **more: object) -> dict[str, object]:
    return {"model": model, "prompt": PROMPT, "max_tokens": max_tokens, "temperature": 0, **more}


def ask(http: httpx.Client, model: str, **more: object) -> str:
    answer = http.post("/v1/completions", json=body(model, **more))
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


class Told(NamedTuple):
    """What somebody was told between two moments: the text, and which revision it is said to be."""

    begin: float
    end: float
    text: str
    fingerprint: str


class Meant(NamedTuple):
    """From some moment between `begin` and `end` on the name meant this adapter."""

    begin: float
    end: float
    adapter: str


def could_be(told: Told, meant: list[Meant]) -> set[str]:
    """Adapters that the name meant at some moment between the request and its answer."""
    nexts = [*meant[1:], Meant(float("inf"), float("inf"), "")]
    return {
        it.adapter for it, after in zip(meant, nexts, strict=True) if it.begin <= told.end and after.end >= told.begin
    }


@pytest.mark.slow
def test_an_answer_is_of_one_revision_and_never_of_one_that_was_replaced_before(
    server: LiveServer, http: httpx.Client, expected: dict[str, Expected]
) -> None:
    by_text = {it.short: name for name, it in expected.items()}
    stop = Event()

    def keep_asking(_: int) -> list[Told]:
        told = []
        with httpx.Client(base_url=server.url, timeout=60) as mine:
            while not stop.is_set():
                begin = time.monotonic()
                answer = mine.post("/v1/completions", json=body("changing"))
                end = time.monotonic()
                assert answer.status_code == 200, answer.text
                it = answer.json()
                told.append(Told(begin, end, it["choices"][0]["text"], it["system_fingerprint"]))
        return told

    meant = [Meant(0.0, 0.0, "one")]
    assert http.put("/v1/adapters/changing", json={"path": "one"}).status_code == 201
    with ThreadPoolExecutor(6) as pool:
        running = [pool.submit(keep_asking, number) for number in range(6)]
        rng = random.Random(8)
        before = "one"
        try:
            for turn in range(14):
                time.sleep(rng.uniform(0, 0.12))
                begin = time.monotonic()
                if turn % 4 == 3:
                    target, now = before, http.post("/v1/adapters/changing/rollback")
                else:
                    target = rng.choice([name for name in ADAPTERS if name != meant[-1].adapter])
                    now = http.put("/v1/adapters/changing", json={"path": target})
                end = time.monotonic()
                assert now.status_code == 200 and now.json()["revision"] == expected[target].revision
                before = meant[-1].adapter
                meant.append(Meant(begin, end, target))
                # whoever asks now is told of nothing older
                first = http.post("/v1/completions", json=body("changing")).json()
                assert first["choices"][0]["text"] == expected[target].short
        finally:
            stop.set()
        answers = [told for it in running for told in it.result()]
    assert len(answers) > 50
    for told in answers:
        assert told.text in by_text, "an answer of no revision: a mixture"
        name = by_text[told.text]
        assert told.fingerprint == f"fp_{expected[name].revision[:16]}"
        assert name in could_be(told, meant), f"{name} answered, when the name meant {could_be(told, meant)}"
    assert len({by_text[told.text] for told in answers}) == len(ADAPTERS)
    assert sum(len(could_be(told, meant)) > 1 for told in answers) > 10  # many were under way at a change


@pytest.mark.slow
@pytest.mark.parametrize("change", always(["replace", "rollback", "delete"], "replace", "delete"))
def test_a_stream_ends_on_the_revision_that_it_began_on(
    change: str, server: LiveServer, http: httpx.Client, expected: dict[str, Expected]
) -> None:
    """Also where its weights are evicted by nobody, but are no name's any more, and others take the other slot."""
    for path in ("two", "three"):
        http.put("/v1/adapters/streaming", json={"path": path})
    with http.stream("POST", "/v1/completions", json=body("streaming", LONG, stream=True)) as streaming:
        lines = streaming.iter_lines()
        begun = [next(lines), next(lines)]
        with httpx.Client(base_url=server.url, timeout=60) as other, ThreadPoolExecutor(1) as pool:
            match change:
                case "replace":
                    assert other.put("/v1/adapters/streaming", json={"path": "esft"}).status_code == 200
                    assert ask(other, "streaming") == expected["esft"].short
                case "rollback":
                    assert other.post("/v1/adapters/streaming/rollback").status_code == 200
                    assert ask(other, "streaming") == expected["two"].short
                case "delete":
                    leaving = pool.submit(other.delete, "/v1/adapters/streaming")
                    while http.get("/v1/models/streaming").status_code == 200:
                        time.sleep(0.01)
            assert server.stats()["heddle_requests_running"] == 1  # it was still under way
            streamed = "".join(it["choices"][0]["text"] for it in events(iter([*begun, *lines])))
            assert streamed == expected["three"].long
            if change == "delete":
                assert leaving.result().status_code == 200
    if change != "delete":
        assert http.delete("/v1/adapters/streaming").status_code == 200
    assert http.post("/v1/completions", json=body("streaming")).status_code == 404


@pytest.mark.slow
def test_two_names_of_the_same_weights_are_served_as_one_and_outlive_each_other(
    http: httpx.Client, expected: dict[str, Expected]
) -> None:
    for name in ("twin-a", "twin-b"):
        assert http.post("/v1/adapters", json={"name": name, "path": "two"}).status_code == 201
    for name in ("twin-a", "twin-b", "twin-a@" + expected["two"].revision[:8]):
        assert ask(http, name) == expected["two"].short
    assert http.delete("/v1/adapters/twin-a").json()["freed"] == {"device_bytes": 0, "disk_bytes": 0}
    assert ask(http, "twin-b") == expected["two"].short
    assert http.put("/v1/adapters/twin-b", json={"path": "one"}).status_code == 200
    assert ask(http, "twin-b") == expected["one"].short
    assert ask(http, "twin-b@" + expected["two"].revision[:8]) == expected["two"].short


@pytest.mark.slow
def test_an_alias_gives_each_user_one_adapter_and_follows_it(http: httpx.Client, expected: dict[str, Expected]) -> None:
    for name, path in (("left", "one"), ("right", "esft")):
        assert http.put(f"/v1/adapters/{name}", json={"path": path}).status_code == 201
    targets = [{"model": "left", "weight": 1}, {"model": "right", "weight": 1}, {"model": "tiny", "weight": 0}]
    assert http.put("/v1/aliases/either", json={"targets": targets}).status_code in (200, 201)
    by_text = {expected["one"].short: "left", expected["esft"].short: "right"}
    users = [f"user-{number}" for number in range(12)]
    first = {user: by_text[ask(http, "either", user=user)] for user in users}
    assert set(first.values()) == {"left", "right"}
    assert {user: by_text[ask(http, "either", user=user)] for user in users} == first
    assert http.put("/v1/adapters/left", json={"path": "three"}).status_code == 200
    by_text = {expected["three"].short: "left", expected["esft"].short: "right"}
    assert {user: by_text[ask(http, "either", user=user)] for user in users} == first
    assert http.delete("/v1/adapters/left").status_code == 409  # the alias stands for it
