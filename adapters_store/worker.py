"""Processes that work for the server, each killed when its time is up, its client has left, or the server stops. The
event loop only waits for them. worker_process.py is their side."""

import asyncio
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from adapters_store.worker_process import MAX_ANSWER_BYTES, READY

START_TIMEOUT_S = 60.0
Answer = TypeVar("Answer")
Result = TypeVar("Result")


class Busy(Exception):
    """As many jobs wait for their turn as may."""


class Closed(Exception):
    """The server stops; nothing is begun any more."""


class WorkerEnded(Exception):
    pass


class Worker(Generic[Answer]):
    """One process, which does one job after another."""

    def __init__(self, process: Process, answers: msgspec.msgpack.Decoder[Answer]) -> None:
        self._process, self._answers = process, answers

    @classmethod
    async def start(
        cls, module: str, answers: msgspec.msgpack.Decoder[Answer], environment: Mapping[str, str] | None = None
    ) -> "Worker[Answer]":
        """Run `python -m module`, with `environment` beside the server's own. Raises WorkerEnded and OSError, of which
        TimeoutError is one."""
        root = str(Path(__file__).resolve().parent.parent)
        whole_environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
            "OPENBLAS_NUM_THREADS": "1",  # numpy's: each thread would reserve addresses, which are limited
            "OMP_NUM_THREADS": "1",
            **(environment or {}),
        }
        # a session of its own: Ctrl-C is for the server, which then kills it
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", module,
            stdin=PIPE, stdout=PIPE, env=whole_environment, start_new_session=True, limit=1 << 20,
        )  # fmt: skip
        worker = cls(process, answers)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                if await process.stdout.read(1) != READY:  # type: ignore[union-attr]
                    raise WorkerEnded
        except BaseException:
            await worker.end()
            raise
        return worker

    @property
    def is_alive(self) -> bool:
        """Asked of the system: the event loop may not have heard of its end yet."""
        if self._process.returncode is not None:
            return False
        try:
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        except ChildProcessError:
            return False

    async def ask(self, job: bytes) -> Answer:
        """Raises WorkerEnded if the process ends over it."""
        stdin, stdout = self._process.stdin, self._process.stdout
        try:
            stdin.writelines((len(job).to_bytes(8, "little"), job))  # type: ignore[union-attr]
            await stdin.drain()  # type: ignore[union-attr]
            size = int.from_bytes(await stdout.readexactly(8), "little")  # type: ignore[union-attr]
            if size > MAX_ANSWER_BYTES:
                raise WorkerEnded
            return self._answers.decode(await stdout.readexactly(size))  # type: ignore[union-attr]
        except (asyncio.IncompleteReadError, ConnectionError, msgspec.DecodeError):
            raise WorkerEnded from None

    def kill(self) -> None:
        if self.is_alive:
            self._process.kill()

    async def end(self) -> None:
        self.kill()
        await asyncio.shield(self._process.wait())


class Turns:
    """At most `num_at_once` jobs are under way, and at most `max_waiting` wait for their turn."""

    def __init__(self, num_at_once: int, max_waiting: int) -> None:
        self._most = num_at_once + max_waiting
        self._turns = asyncio.Semaphore(num_at_once)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    async def run(self, job: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """The job's result. Raises Busy or Closed. If the caller is cancelled, so is the job."""
        if self._closed:
            raise Closed
        if len(self._tasks) >= self._most:
            raise Busy
        task = asyncio.create_task(self._in_turn(job))
        self._tasks.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            if self._closed and not _is_cancelled():
                raise Closed from None
            raise
        finally:
            self._tasks.discard(task)

    async def close(self) -> None:
        """Cancel whatever is under way; at once, and for good."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _in_turn(self, job: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        async with self._turns:
            return await job()


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
