"""Verification in processes that can be killed: in time, at shutdown, and when nobody waits any more."""

import asyncio
import gc
import logging
import os
import signal
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
from safetensors.numpy import save_file

from adapters_store import verify as worker
from adapters_store.base_spec import BaseSpec, ExpertStack
from adapters_store.errors import (
    AdapterError,
    AdapterPathRefused,
    CoverageError,
    InvalidAdapter,
    NoAdapterThere,
    UnsupportedAdapter,
)
from adapters_store.parts import AdapterPackage
from adapters_store.rules import Rules
from adapters_store.verifier import Verifier, VerifierBusy, VerifierClosed, _encode
from adapters_store.verify import Job
from adapters_store.worker_process import NICENESS
from tests.support.adapter_files import esft, lora, slow_patterns
from tests.support.waiting import soon

ROOT = Path(__file__).resolve().parents[2]


def slow(directory: Path) -> Path:
    """An adapter that takes minutes."""
    return lora(directory, rank_pattern=slow_patterns())


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


def at_work() -> list[psutil.Process]:
    """Those that have a job: with it comes a limit on the processor's time."""
    ours = psutil.Process().rlimit(psutil.RLIMIT_CPU)
    return [it for it in children() if it.rlimit(psutil.RLIMIT_CPU) != ours]


def test_it_finds_what_is_found_in_process_and_uses_its_process_again(
    tmp_path: Path, job: Callable[[str], Job]
) -> None:
    lora(tmp_path / "a"), esft(tmp_path / "b", {1: [0, 2]})

    async def test(verifier: Verifier) -> None:
        for name in ("a", "b"):
            assert await verifier.verify(job(name)) == worker.answer(job(name))
        assert len(children()) == 1

    run(test)


def test_refusals_arrive_as_they_were_raised(tmp_path: Path, job: Callable[[str], Job]) -> None:
    lora(tmp_path / "dora", lora_bias=True), esft(tmp_path / "short", {1: [0]}, experts={"1": [0, 1]})
    (tmp_path / "empty").mkdir()

    async def test(verifier: Verifier) -> None:
        kinds = {"dora": UnsupportedAdapter, "short": CoverageError, "empty": NoAdapterThere, "..": AdapterPathRefused}
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
        with pytest.raises(InvalidAdapter, match=r"took more than 1\.5 s .*--verify-timeout-s"):
            await verifier.verify(job("slow"))
        assert children() == []
        assert (await verifier.verify(job("good"))).weights.kind == "lora"

    run(test, timeout_s=1.5)


def test_closing_kills_what_is_under_way_at_once(tmp_path: Path, job: Callable[[str], Job]) -> None:
    slow(tmp_path / "slow")

    async def test(verifier: Verifier) -> None:
        waiting = [asyncio.create_task(verifier.verify(job("slow"))) for _ in range(5)]
        await soon(lambda: len(at_work()) == 2)
        start = time.monotonic()
        await verifier.close()
        assert time.monotonic() - start < 20 and children() == []  # minutes, if they were waited for
        assert {type(it) for it in await asyncio.gather(*waiting, return_exceptions=True)} == {VerifierClosed}
        with pytest.raises(VerifierClosed):
            await verifier.verify(job("slow"))

    run(test)


def test_a_client_that_leaves_ends_its_verification(tmp_path: Path, job: Callable[[str], Job]) -> None:
    slow(tmp_path / "slow"), lora(tmp_path / "good")

    async def test(verifier: Verifier) -> None:
        leaving = asyncio.create_task(verifier.verify(job("slow")))
        staying = asyncio.create_task(verifier.verify(job("good")))  # there is one process
        await soon(at_work)
        leaving.cancel()
        assert (await staying).weights.kind == "lora"
        assert leaving.cancelled()

    run(test, timeout_s=600, num_workers=1)


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


def test_whoever_has_been_verified_waits_no_more(tmp_path: Path, job: Callable[[str], Job]) -> None:
    lora(tmp_path / "a")

    async def test(verifier: Verifier) -> None:
        for path in ("a", "nowhere", "a", "a"):  # one after another there is always room, after refusals too
            try:
                assert (await verifier.verify(job(path))).weights.kind == "lora"
            except InvalidAdapter:
                assert path == "nowhere"

    run(test, num_workers=1, max_waiting=0)


def test_a_process_that_dies_fails_its_adapter_only(tmp_path: Path, job: Callable[[str], Job]) -> None:
    slow(tmp_path / "slow"), lora(tmp_path / "good")

    async def test(verifier: Verifier) -> None:
        victim = asyncio.create_task(verifier.verify(job("slow")))
        await soon(at_work)
        children()[0].send_signal(signal.SIGKILL)
        with pytest.raises(InvalidAdapter, match="ended the process"):
            await victim
        assert (await verifier.verify(job("good"))).weights.kind == "lora"
        children()[0].send_signal(signal.SIGKILL)  # while it is idle
        await soon(lambda: not verifier._idle[0].is_alive)
        assert (await verifier.verify(job("good"))).weights.kind == "lora"

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


def test_a_process_finds_our_code_wherever_the_server_was_started_and_stands_apart_from_it(
    tmp_path: Path, job: Callable[[str], Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    lora(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")

    async def test(verifier: Verifier) -> None:
        assert (await verifier.verify(job("a"))).weights.kind == "lora"
        child = children()[0]
        environment = child.environ()
        assert environment["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "/elsewhere"]
        assert environment["OPENBLAS_NUM_THREADS"] == environment["OMP_NUM_THREADS"] == "1"
        assert environment["PATH"] == os.environ["PATH"]
        assert os.getsid(child.pid) == child.pid  # Ctrl-C is the server's
        assert child.nice() == max(NICENESS, psutil.Process().nice())  # and the processors are the engine's first
        group = Path(f"/proc/{child.pid}/autogroup")
        assert not group.exists() or group.read_text().endswith(f"nice {NICENESS}\n")

    run(test)


def test_a_process_that_is_long_in_starting_is_given_up(
    tmp_path: Path, job: Callable[[str], Job], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lora(tmp_path / "a")
    program = tmp_path / "sleeps"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o700)
    monkeypatch.setattr("sys.executable", str(program))
    monkeypatch.setattr("adapters_store.worker.START_TIMEOUT_S", 0.2)

    async def test(verifier: Verifier) -> None:
        with pytest.raises(InvalidAdapter) as refusal:
            await verifier.verify(job("a"))
        assert str(refusal.value) == (
            "the adapter could not be verified: the process for that did not start, which the server's log explains"
        )

    with caplog.at_level(logging.ERROR, "heddle.adapters"):
        run(test)
    assert "a process to verify an adapter did not start: TimeoutError()" in caplog.text


def test_what_nobody_had_thought_of_is_logged_where_the_server_logs(
    tmp_path: Path, job: Callable[[str], Job], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def ask(worker_: object, encoded: bytes) -> worker.Answer:
        return worker.Refused("InvalidAdapter", "a message", "a traceback")

    monkeypatch.setattr("adapters_store.verifier.Worker.ask", ask)

    async def test(verifier: Verifier) -> None:
        with pytest.raises(InvalidAdapter, match="^a message$"):
            await verifier.verify(job("a"))

    with caplog.at_level(logging.ERROR, "heddle.adapters"):
        run(test)
    assert "an adapter could not be verified: a traceback" in caplog.text


@pytest.mark.parametrize(("timeout_s", "cpu_seconds"), [(0.5, 2), (30, 31), (59.1, 61)])
def test_a_process_may_spend_a_second_more_than_is_waited_for_it(
    tmp_path: Path, job: Callable[[str], Job], timeout_s: float, cpu_seconds: int
) -> None:
    sent = msgspec.msgpack.decode(_encode(job("a"), timeout_s), type=Job)
    assert sent == msgspec.structs.replace(job("a"), cpu_seconds=cpu_seconds)


def test_whoever_was_cancelled_hears_that_also_while_the_server_stops(
    tmp_path: Path, job: Callable[[str], Job]
) -> None:
    slow(tmp_path / "slow")

    async def test(verifier: Verifier) -> None:
        leaving, staying = (asyncio.create_task(verifier.verify(job("slow"))) for _ in range(2))
        await soon(lambda: len(children()) == 2)
        leaving.cancel()
        await verifier.close()
        ended = await asyncio.gather(leaving, staying, return_exceptions=True)
        assert [type(it) for it in ended] == [asyncio.CancelledError, VerifierClosed]

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


def test_the_event_loop_is_not_held_up(tmp_path: Path) -> None:
    """By an adapter of as many tensors as are served: to start a process, and to read a long answer."""
    experts, layers = 128, 52
    base = BaseSpec(
        "moe", {}, {layer: ExpertStack(experts, 1, 1, f"model.layers.{layer}.mlp.experts") for layer in range(layers)}
    )
    (tmp_path / "a").mkdir()
    for shard in range(4):
        tensors = {
            f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight": np.ones((1, 1), np.float16)
            for layer in range(shard * 13, shard * 13 + 13)
            for expert in range(experts)
            for name in ("gate", "up", "down")
        }
        save_file(tensors, tmp_path / "a" / f"model-{shard}.safetensors")
    rules = Rules(base, (tmp_path,))
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
        packed = (await verifier.verify(rules.job("a"))).content.package
        assert len(msgspec.msgpack.decode(packed, type=AdapterPackage).parts) == experts * layers
        watching.cancel()

    gc.collect()
    gc.freeze()  # what the tests have imported, torch above all, is no part of a server's front
    try:
        run(test, timeout_s=600)
    finally:
        gc.unfreeze()
    assert max(gaps) < 0.05
