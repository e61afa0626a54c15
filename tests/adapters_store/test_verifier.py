"""Verification in processes that can be killed: in time, at shutdown, and when nobody waits any more."""

import asyncio
import gc
import json
import signal
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from adapters_store import verify as worker
from adapters_store.base_spec import BaseSpec, ExpertStack
from adapters_store.catalog import Catalog
from adapters_store.errors import (
    MAX_MESSAGE_BYTES,
    AdapterError,
    AdapterPathRefused,
    CoverageError,
    InvalidAdapter,
    UnsupportedAdapter,
)
from adapters_store.verifier import Verifier, VerifierBusy, VerifierClosed
from adapters_store.verify import Job
from server.api.adapters import verified
from server.errors import HeddleError, Overloaded, ShuttingDown
from tests.adapters_store.test_formats import BASE, esft, lora

# matching this against a module's name takes for ever, and has a limit of its own; so many of them take minutes
SLOW = "(.|..|...)+(.|..|...)+(?<=!)"


def slow(directory: Path) -> Path:
    """Takes minutes: patterns below the limit on one match, but two thousand of them."""
    patterns = {rf"(.|..|...){{1,10}}(?<=!)(?#{number})": 2 for number in range(1999)}
    return lora(directory, rank_pattern=patterns)


def run(test: Callable[[Verifier], Coroutine[Any, Any, None]], timeout_s: float = 30, **options: int) -> None:
    async def body() -> None:
        verifier = Verifier(timeout_s, **options)
        try:
            await test(verifier)
        finally:
            await verifier.close()
        assert children() == []

    asyncio.run(body())


def children() -> list[psutil.Process]:
    return [it for it in psutil.Process().children() if "adapters_store.verify" in it.cmdline()]


@pytest.fixture
def job(tmp_path: Path) -> Callable[[str], Job]:
    catalog = Catalog("base", BASE, (tmp_path,))
    return lambda path: catalog.job("x", path)


def test_it_finds_what_is_found_in_process_and_uses_its_process_again(
    tmp_path: Path, job: Callable[[str], Job]
) -> None:
    lora(tmp_path / "a"), esft(tmp_path / "b", {1: [0, 2]})

    async def test(verifier: Verifier) -> None:
        for name in ("a", "b"):
            assert await verifier.verify(job(name)) == worker.verify(job(name))
        assert len(children()) == 1

    run(test)


def test_refusals_arrive_as_they_were_raised(tmp_path: Path, job: Callable[[str], Job]) -> None:
    lora(tmp_path / "dora", use_dora=True), esft(tmp_path / "short", {1: [0]}, experts={"1": [0, 1]})
    (tmp_path / "empty").mkdir()

    async def test(verifier: Verifier) -> None:
        kinds = {"dora": UnsupportedAdapter, "short": CoverageError, "empty": InvalidAdapter, "..": AdapterPathRefused}
        for path, kind in kinds.items():
            with pytest.raises(AdapterError) as here:
                worker.verify(job(path))
            with pytest.raises(kind) as there:
                await verifier.verify(job(path))
            assert type(there.value) is kind and str(there.value) == str(here.value)
        with pytest.raises(InvalidAdapter, match="not UTF-8"):
            await verifier.verify(job("\udcff"))
        assert len(children()) == 1

    run(test)


def test_an_adapter_that_takes_too_long_is_given_up_and_the_next_is_verified(
    tmp_path: Path, job: Callable[[str], Job]
) -> None:
    slow(tmp_path / "slow"), lora(tmp_path / "good")

    async def test(verifier: Verifier) -> None:
        start = time.monotonic()
        with pytest.raises(InvalidAdapter, match=r"took more than 0\.5 s .*--verify-timeout-s"):
            await verifier.verify(job("slow"))
        assert time.monotonic() - start < 5  # of which most is the process's start
        assert children() == []
        assert (await verifier.verify(job("good"))).package.kind == "lora"

    run(test, timeout_s=0.5)


def test_one_slow_match_is_refused_by_its_pattern(tmp_path: Path, job: Callable[[str], Job]) -> None:
    lora(tmp_path / "a", rank_pattern={"q_proj": 2, "up_proj": 2, SLOW: 2})
    lora(tmp_path / "b", alpha_pattern={SLOW: 2})
    with pytest.raises(InvalidAdapter, match="pattern number 1 of alpha_pattern"):
        worker.verify(job("b"))
    assert worker.verify(job("a"))  # never tried: others match first


def test_closing_kills_what_is_under_way_at_once(tmp_path: Path, job: Callable[[str], Job]) -> None:
    slow(tmp_path / "slow")

    async def test(verifier: Verifier) -> None:
        waiting = [asyncio.create_task(verifier.verify(job("slow"))) for _ in range(5)]
        while len(children()) < 2:
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.5)
        start = time.monotonic()
        await verifier.close()
        assert time.monotonic() - start < 1
        assert {type(it) for it in await asyncio.gather(*waiting, return_exceptions=True)} == {VerifierClosed}
        with pytest.raises(VerifierClosed):
            await verifier.verify(job("slow"))

    run(test)


def test_a_client_that_leaves_ends_its_verification(tmp_path: Path, job: Callable[[str], Job]) -> None:
    slow(tmp_path / "slow"), lora(tmp_path / "good")

    async def test(verifier: Verifier) -> None:
        leaving = asyncio.create_task(verifier.verify(job("slow")))
        staying = asyncio.create_task(verifier.verify(job("good")))  # there is one process
        while not children():
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.5)
        leaving.cancel()
        assert (await staying).package.kind == "lora"
        assert leaving.cancelled()

    run(test, num_workers=1)


def test_no_more_wait_than_may(tmp_path: Path, job: Callable[[str], Job]) -> None:
    slow(tmp_path / "slow")

    async def test(verifier: Verifier) -> None:
        waiting = [asyncio.create_task(verifier.verify(job("slow"))) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(VerifierBusy):
            await verifier.verify(job("slow"))
        await verifier.close()
        await asyncio.gather(*waiting, return_exceptions=True)

    run(test, num_workers=1, max_waiting=2)


def test_a_process_that_dies_fails_its_adapter_only(tmp_path: Path, job: Callable[[str], Job]) -> None:
    slow(tmp_path / "slow"), lora(tmp_path / "good")

    async def test(verifier: Verifier) -> None:
        victim = asyncio.create_task(verifier.verify(job("slow")))
        while not children():
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.5)
        children()[0].send_signal(signal.SIGKILL)
        with pytest.raises(InvalidAdapter, match="ended the process"):
            await victim
        assert await verifier.verify(job("good"))
        children()[0].send_signal(signal.SIGKILL)  # while it is idle
        await asyncio.sleep(0.2)
        assert await verifier.verify(job("good"))

    run(test)


def test_a_process_that_does_not_start_is_a_refusal(
    tmp_path: Path, job: Callable[[str], Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    lora(tmp_path / "a")

    async def test(verifier: Verifier) -> None:
        for program in ("/nowhere", "/bin/true"):
            monkeypatch.setattr("sys.executable", program)
            with pytest.raises(InvalidAdapter, match="the process for that did not start"):
                await verifier.verify(job("a"))

    run(test)


def test_memory_is_limited(tmp_path: Path, job: Callable[[str], Job]) -> None:
    """A pattern of a few bytes that would take terabytes."""
    lora(tmp_path / "a", rank_pattern={"((((a{60}){60}){60}){60}){60}": 2})

    async def test(verifier: Verifier) -> None:
        with pytest.raises(InvalidAdapter, match="MemoryError"):
            await verifier.verify(job("a"))

    run(test)


def test_a_process_ends_with_its_parent(tmp_path: Path, job: Callable[[str], Job]) -> None:
    """Its standard input ends then; the processor's time is limited besides."""
    lora(tmp_path / "a")

    async def test(verifier: Verifier) -> None:
        await verifier.verify(job("a"))
        child, stdin = children()[0], verifier._idle[0]._process.stdin
        assert child.rlimit(psutil.RLIMIT_AS)[0] == worker.MAX_MEMORY_BYTES
        assert 30 <= child.rlimit(psutil.RLIMIT_CPU)[0] <= 40
        assert stdin is not None
        stdin.close()
        await asyncio.to_thread(child.wait, 10)

    run(test)


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


NESTED = '{"peft_type": "LORA", "r": 1, "lora_alpha": 1, "rank_pattern": ' + '{"a":' * 900 + "1" + "}" * 901


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("adapter_config.json", NESTED),
        ("adapter_config.json", NESTED.replace("rank_pattern", "unknown")),
        ("adapter_config.json", NESTED.replace("rank_pattern", "target_modules")),
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


def test_the_event_loop_is_not_held_up(tmp_path: Path) -> None:
    """By an adapter of as many tensors as are served: to start a process, and to read a long answer."""
    experts, layers = 128, 52
    base = BaseSpec("moe", {}, {layer: ExpertStack(experts, 1, 1, "gated") for layer in range(layers)})
    (tmp_path / "a").mkdir()
    for shard in range(4):
        tensors = {
            f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight": np.ones((1, 1), np.float16)
            for layer in range(shard * 13, shard * 13 + 13)
            for expert in range(experts)
            for name in ("gate", "up", "down")
        }
        save_file(tensors, tmp_path / "a" / f"model-{shard}.safetensors")
    catalog = Catalog("base", base, (tmp_path,))
    gaps: list[float] = []

    async def watch() -> None:
        last = time.thread_time()
        while True:
            await asyncio.sleep(0.001)
            now = time.thread_time()  # of this thread: what others of this machine take does not count
            gaps.append(now - last)
            last = now

    async def test(verifier: Verifier) -> None:
        watching = asyncio.create_task(watch())
        for _ in range(3):
            assert len((await verifier.verify(catalog.job("x", "a"))).package.parts) == experts * layers
        watching.cancel()

    gc.collect()
    gc.freeze()  # what the tests have imported, torch above all, is no part of a server's front
    try:
        run(test)
    finally:
        gc.unfreeze()
    assert max(gaps) < 0.05


def test_an_index_over_a_mebibyte_costs_nothing(tmp_path: Path, job: Callable[[str], Job]) -> None:
    directory = esft(tmp_path / "a", {1: [0]})
    index = {"weight_map": {f"k{number}": "x" for number in range(100_000)}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    start = time.process_time()
    with pytest.raises(InvalidAdapter, match="at most 1,048,576 are read"):
        worker.verify(job("a"))
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize(("raised", "told"), [(VerifierBusy, Overloaded), (VerifierClosed, ShuttingDown)])
def test_over_http_what_is_the_servers_own_lack_is_a_503(
    tmp_path: Path, raised: type[Exception], told: type[HeddleError]
) -> None:
    class Refusing:
        async def verify(self, job: Job) -> None:
            raise raised

    service: Any = SimpleNamespace(catalog=Catalog("base", BASE, (tmp_path,)), verifier=Refusing())
    with pytest.raises(told) as error:
        asyncio.run(verified("x", "a", service))
    assert error.value.status == 503
