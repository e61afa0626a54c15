"""What verification says of whatever lies there: the adapter, or a refusal in few words; never anything else."""

import io
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters_store import verify as worker
from adapters_store.errors import MAX_MESSAGE_BYTES, AdapterError, AdapterPathRefused, InvalidAdapter
from adapters_store.verify import Job
from adapters_store.worker_process import READY
from tests.support.adapter_files import BASE, NESTED_CONFIG, esft, lora

# matching this against a module's name takes for ever, and has a limit of its own
SLOW = "(.|..|...)+(.|..|...)+(?<=!)"


def test_one_slow_match_is_refused_by_its_pattern(tmp_path: Path, job: Callable[[str], Job]) -> None:
    lora(tmp_path / "a", rank_pattern={"q_proj": 2, "up_proj": 2, SLOW: 2})
    lora(tmp_path / "b", alpha_pattern={SLOW: 2})
    with pytest.raises(InvalidAdapter, match="pattern number 1 of alpha_pattern"):
        worker.verify(job("b"))
    assert worker.verify(job("a")).package.kind == "lora"  # never tried: others match first


@pytest.mark.parametrize("error", [MemoryError(), RecursionError(), ValueError("[/x]\x1b[2J" * 900), KeyError("a")])
def test_whatever_goes_wrong_is_a_refusal(
    tmp_path: Path, job: Callable[[str], Job], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    lora(tmp_path / "a")
    monkeypatch.setattr(worker, "read_adapter", fail)
    answer = worker.answer(job("a"))
    assert isinstance(answer, worker.Refused) and answer.kind == "InvalidAdapter"
    assert type(error).__name__ in answer.message and len(answer.message) < 200
    assert "Traceback" in answer.details and len(answer.details) <= 8000 and "\x1b" not in answer.details


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("adapter_config.json", NESTED_CONFIG),
        ("adapter_config.json", NESTED_CONFIG.replace("rank_pattern", "unknown")),
        ("adapter_config.json", NESTED_CONFIG.replace("rank_pattern", "target_modules")),
        ("adapter_config.json", '{"peft_type": "LORA", "r": 1' + "0" * 4200 + ', "lora_alpha": 1}'),
        ("adapter_config.json", '{"peft_type": "LORA", "r": 1, "lora_alpha": 1e999}'),
        ("expert_cfg.json", '{"experts": {"' + "1" * 4500 + '": [0]}}'),
        ("expert_cfg.json", '{"experts": {"1": [' + "1" * 4200 + "]}}"),
    ],
)
def test_hostile_configurations_are_refused_in_few_words(
    tmp_path: Path, job: Callable[[str], Job], file: str, text: str
) -> None:
    directory = lora(tmp_path / "a") if file == "adapter_config.json" else esft(tmp_path / "a", {1: [0]})
    (directory / file).write_text(text)
    answer = worker.answer(job("a"))
    assert isinstance(answer, worker.Refused) and answer.details == "", answer
    assert len(answer.message.encode()) <= MAX_MESSAGE_BYTES


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


_PEFT_KEYS = ["r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "target_parameters",
              "init_lora_weights", "peft_type", "task_type", "bias", "base_model_name_or_path", "other"]  # fmt: skip


_ESFT_KEYS = ["experts", "shared_experts", "non_expert_modules", "other"]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    peft=st.dictionaries(st.sampled_from(_PEFT_KEYS), _JSON, max_size=3),
    esft_config=st.dictionaries(st.sampled_from(_ESFT_KEYS), _JSON, max_size=3),
    index=st.dictionaries(st.sampled_from(["metadata", "weight_map", "other"]), _JSON, max_size=3),
)
def test_no_configuration_is_unforeseen(
    tmp_path: Path, job: Callable[[str], Job], peft: Any, esft_config: Any, index: Any
) -> None:
    lora(tmp_path / "a", **peft)
    esft(tmp_path / "b", {1: [0]}, **esft_config)
    (esft(tmp_path / "c", {1: [0]}) / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in ("a", "b", "c"):
        answer = worker.answer(job(path))
        assert isinstance(answer, worker.Verified) or answer.details == "", answer.details


def test_an_index_over_a_mebibyte_costs_nothing(tmp_path: Path, job: Callable[[str], Job]) -> None:
    directory = esft(tmp_path / "a", {1: [0]})
    index = {"weight_map": {f"k{number}": "x" for number in range(100_000)}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    start = time.process_time()
    with pytest.raises(InvalidAdapter, match="at most 1,048,576 are read"):
        worker.verify(job("a"))
    assert time.process_time() - start < 0.5


def test_a_refusal_crosses_to_another_process_as_it_is(tmp_path: Path, job: Callable[[str], Job]) -> None:
    lora(tmp_path / "dora", lora_bias=True), esft(tmp_path / "short", {1: [0]}, experts={"1": [0, 1]})
    (tmp_path / "empty").mkdir()
    (lora(tmp_path / "torn") / "adapter_config.json").write_text("{")
    (lora(tmp_path / "manifest") / "heddle.json").write_text('{"weight": -1}')
    kinds = {"manifest": "InvalidManifest", "..": "AdapterPathRefused", "empty": "NoAdapterThere",
             "dora": "UnsupportedAdapter", "short": "CoverageError", "torn": "InvalidAdapter"}  # fmt: skip
    for path, kind in kinds.items():
        with pytest.raises(AdapterError) as here:
            worker.verify(job(path))
        answer = worker.answer(job(path))
        assert answer == worker.Refused(kind, str(here.value))  # type: ignore[arg-type]
        there = worker.refusal(answer)  # type: ignore[arg-type]
        assert type(there) is type(here.value) and str(there) == str(here.value)
    assert {kind.__name__ for kind in worker._KINDS.values()} == {*kinds.values(), "StoreFull", "StoreFailed"}


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("a\0b", "the path holds a NUL byte; send the directory's name as it is"),
        ("a" * 300, "the adapter cannot be read: File name too long; see that the server's user may read the files"),
        ("nowhere", "'nowhere' is not a directory; send that of the adapter"),
        ("..", "move it there, or start the server with --adapter-root"),
    ],
)
def test_a_path_that_leads_nowhere_is_told_without_the_way_there(
    tmp_path: Path, job: Callable[[str], Job], path: str, says: str
) -> None:
    with pytest.raises(AdapterError) as refusal:
        worker.verify(job(path))
    assert str(refusal.value).endswith(says) and str(tmp_path) not in str(refusal.value)


def test_without_a_directory_of_adapters_nothing_is_read() -> None:
    with pytest.raises(AdapterPathRefused) as refusal:
        worker.verify(Job("/", (), BASE))
    assert str(refusal.value) == (
        "this server was started without an adapter directory, so no path may be read: start it with --adapters or "
        "--adapter-root"
    )


def test_an_answer_carries_the_place_below_the_root(tmp_path: Path, job: Callable[[str], Job]) -> None:
    (tmp_path / "org").mkdir()
    lora(tmp_path / "org" / "a")
    answer = worker.answer(job("org/../org/a"))
    assert isinstance(answer, worker.Verified) and answer.root == "org/a"


# -- the process ---


class Standard:
    """Standard input and output, as far as bytes go."""

    def __init__(self, sent: bytes = b"") -> None:
        self.buffer = io.BytesIO(sent)


def frame(message: Any) -> bytes:
    encoded = msgspec.msgpack.encode(message)
    return len(encoded).to_bytes(8, "little") + encoded


def work(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> tuple[list[worker.Answer], dict[int, list[int]]]:
    """What the process answers to these bytes, and which limits it sets itself."""
    limits: dict[int, list[int]] = {}
    output = Standard()
    monkeypatch.setattr("sys.stdin", Standard(sent))
    monkeypatch.setattr("sys.stdout", output)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, both: limits.setdefault(kind, []).append(both[0]))
    monkeypatch.setattr("adapters_store.worker_process._give_way", lambda niceness: None)  # it is our own process here
    worker.main()
    written = output.buffer.getvalue()
    assert written[:1] == READY
    answers, rest = [], written[1:]
    while rest:
        size = int.from_bytes(rest[:8], "little")
        answers.append(msgspec.msgpack.decode(rest[8 : 8 + size], type=worker.Answer))
        rest = rest[8 + size :]
    return answers, limits


def test_jobs_are_answered_in_their_order_until_no_more_come(
    tmp_path: Path, job: Callable[[str], Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    lora(tmp_path / "a")
    jobs = [job("a"), job("nowhere"), job("a")]
    answers, _ = work(monkeypatch, b"".join(map(frame, jobs)))
    assert answers == [worker.answer(it) for it in jobs]
    assert work(monkeypatch, b"") == ([], {resource.RLIMIT_AS: [worker.MAX_MEMORY_BYTES]})
    assert work(monkeypatch, frame(job("a")) + b"\0" * 7)[0] == answers[:1]  # a frame that is cut off is none


def test_each_job_may_take_so_many_seconds_more_of_the_processor(
    job: Callable[[str], Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    spent = iter([(1.2, 0.5), (7.0, 1.0)])

    def getrusage(who: int) -> Any:
        assert who == resource.RUSAGE_SELF
        user, system = next(spent)
        return SimpleNamespace(ru_utime=user, ru_stime=system)

    monkeypatch.setattr(resource, "getrusage", getrusage)
    jobs = [msgspec.structs.replace(job("nowhere"), cpu_seconds=seconds) for seconds in (5, 10)]
    _, limits = work(monkeypatch, b"".join(map(frame, jobs)))
    assert limits == {resource.RLIMIT_AS: [worker.MAX_MEMORY_BYTES], resource.RLIMIT_CPU: [2 + 5, 8 + 10]}


def test_an_answer_that_has_no_bytes_is_a_refusal(
    tmp_path: Path, job: Callable[[str], Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link's target may hold halves of surrogate pairs: names that are not UTF-8."""
    lora(tmp_path / "a")
    os.rename(tmp_path / "a", os.fsencode(tmp_path) + b"/\xff")
    (tmp_path / "link").symlink_to(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    answers, _ = work(monkeypatch, frame(job("link")) * 2)
    assert answers == [worker.Refused("InvalidAdapter", "a name in the adapter's path is not UTF-8; rename it")] * 2


@pytest.mark.parametrize(("hard", "expected"), [(-1, (100, -1)), (150, (100, 150)), (100, (100, 100)), (70, (70, 70))])
def test_a_limit_is_never_above_what_whoever_started_the_server_has_set(
    monkeypatch: pytest.MonkeyPatch, hard: int, expected: tuple[int, int]
) -> None:
    assert resource.RLIM_INFINITY == -1
    asked: list[Any] = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: asked.append(kind) or (50, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, both: asked.append((kind, both)))
    worker.limit(resource.RLIMIT_CPU, 100)
    assert asked == [resource.RLIMIT_CPU, (resource.RLIMIT_CPU, expected)]
