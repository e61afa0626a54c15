"""The server's side of verification: processes that do it, each killed when its time is up, its client has left, or the
server stops. The event loop only waits for them."""

import asyncio
import logging
import math
import os
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path

import msgspec

from adapters_store.errors import InvalidAdapter
from adapters_store.verify import MAX_ANSWER_BYTES, READY, Answer, Job, Refused, Verified, refusal

log = logging.getLogger("heddle.adapters")
START_TIMEOUT_S = 60.0
_ANSWERS: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


class VerifierBusy(Exception):
    """As many adapters wait to be verified as may."""


class VerifierClosed(Exception):
    """The server stops; nothing is verified any more."""


class _WorkerEnded(Exception):
    pass


class _Worker:
    """One process, which verifies adapters one after another."""

    def __init__(self, process: Process) -> None:
        self._process = process

    @classmethod
    async def start(cls) -> "_Worker":
        root = str(Path(__file__).resolve().parent.parent)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
            "OPENBLAS_NUM_THREADS": "1",  # numpy's: each thread would reserve addresses, which are limited
            "OMP_NUM_THREADS": "1",
        }
        # a session of its own: Ctrl-C is for the server, which then kills it
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "adapters_store.verify",
            stdin=PIPE, stdout=PIPE, env=environment, start_new_session=True, limit=1 << 20,
        )  # fmt: skip
        worker = cls(process)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                if await process.stdout.read(1) != READY:  # type: ignore[union-attr]
                    raise _WorkerEnded
        except BaseException:
            await worker.end()
            raise
        return worker

    @property
    def is_alive(self) -> bool:
        return self._process.returncode is None

    async def ask(self, job: bytes) -> Answer:
        """Raises _WorkerEnded if the process ends over it."""
        stdin, stdout = self._process.stdin, self._process.stdout
        try:
            stdin.writelines((len(job).to_bytes(8, "little"), job))  # type: ignore[union-attr]
            await stdin.drain()  # type: ignore[union-attr]
            size = int.from_bytes(await stdout.readexactly(8), "little")  # type: ignore[union-attr]
            if size > MAX_ANSWER_BYTES:
                raise _WorkerEnded
            return _ANSWERS.decode(await stdout.readexactly(size))  # type: ignore[union-attr]
        except (asyncio.IncompleteReadError, ConnectionError, msgspec.DecodeError):
            raise _WorkerEnded from None

    def kill(self) -> None:
        if self.is_alive:
            self._process.kill()

    async def end(self) -> None:
        self.kill()
        await asyncio.shield(self._process.wait())


class Verifier:
    """Verifies adapters in `num_workers` processes, `timeout_s` seconds each at most from when its turn has come.

    Starting Python costs more than most adapters do, so a process is used again, and one is started only where none is
    idle. At most `max_waiting` adapters wait for their turn.
    """

    def __init__(self, timeout_s: float, num_workers: int = 2, max_waiting: int = 64) -> None:
        self._timeout_s, self._max_waiting = timeout_s, max_waiting
        self._turns = asyncio.Semaphore(num_workers)
        self._idle: list[_Worker] = []
        self._tasks: set[asyncio.Task[Verified]] = set()
        self._num_workers = num_workers
        self._closed = False

    async def verify(self, job: Job) -> Verified:
        """Raises AdapterError, VerifierBusy or VerifierClosed. If the caller is cancelled, so is the work."""
        if self._closed:
            raise VerifierClosed
        if len(self._tasks) >= self._num_workers + self._max_waiting:
            raise VerifierBusy
        task = asyncio.create_task(self._in_turn(job))
        self._tasks.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            if self._closed and not _is_cancelled():
                raise VerifierClosed from None
            raise
        finally:
            self._tasks.discard(task)

    async def close(self) -> None:
        """Kill whatever is under way; at once, and for good."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(worker.end() for worker in self._idle))
        self._idle.clear()

    async def _in_turn(self, job: Job) -> Verified:
        encoded = _encode(job, self._timeout_s)
        async with self._turns:
            worker, is_sound = await self._worker(), False
            try:
                async with asyncio.timeout(self._timeout_s):
                    answer = await worker.ask(encoded)
                is_sound = True
            except TimeoutError:
                raise InvalidAdapter(
                    f"verifying the adapter took more than {self._timeout_s:g} s and was given up "
                    "(--verify-timeout-s); large files take long to read, and so do many or costly patterns"
                ) from None
            except _WorkerEnded:
                raise InvalidAdapter(
                    "verifying the adapter ended the process that did it, for want of memory perhaps; a smaller "
                    "configuration and fewer tensors need less"
                ) from None
            finally:
                if is_sound:
                    self._idle.append(worker)
                else:
                    await worker.end()
        if isinstance(answer, Refused):
            if answer.details:
                log.error("an adapter could not be verified: %s", answer.details)
            raise refusal(answer)
        return answer

    async def _worker(self) -> _Worker:
        while self._idle:
            worker = self._idle.pop()
            if worker.is_alive:
                return worker
            await worker.end()
        try:
            return await _Worker.start()
        except (_WorkerEnded, OSError) as error:  # a TimeoutError is an OSError
            log.error("a process to verify an adapter did not start: %r", error)
            raise InvalidAdapter(
                "the adapter could not be verified: the process for that did not start, which the server's log explains"
            ) from None


def _encode(job: Job, timeout_s: float) -> bytes:
    try:
        return msgspec.msgpack.encode(msgspec.structs.replace(job, cpu_seconds=math.ceil(timeout_s) + 1))
    except UnicodeEncodeError:
        raise InvalidAdapter("the path is not UTF-8; rename the directory") from None


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
