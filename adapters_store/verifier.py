"""The server's side of verification: processes that do it, each killed when its time is up, its client has left, or the
server stops. The event loop only waits for them."""

import asyncio
import logging
import math
from functools import partial

import msgspec

from adapters_store.errors import GivenUp, InvalidAdapter
from adapters_store.verify import Answer, Job, Refused, Verified, refusal
from adapters_store.worker import Busy, Closed, Turns, Worker, WorkerEnded

log = logging.getLogger("heddle.adapters")
_ANSWERS: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
VerifierBusy, VerifierClosed = Busy, Closed


class Verifier:
    """Verifies adapters in `num_workers` processes, `timeout_s` seconds each at most from when its turn has come.

    Starting Python costs more than most adapters do, so a process is used again, and one is started only where none is
    idle. At most `max_waiting` adapters wait for their turn.
    """

    def __init__(self, timeout_s: float, num_workers: int = 2, max_waiting: int = 64) -> None:
        self._timeout_s = timeout_s
        self._turns = Turns(num_workers, max_waiting)
        self._idle: list[Worker[Answer]] = []

    async def verify(self, job: Job) -> Verified:
        """Raises AdapterError, VerifierBusy or VerifierClosed. If the caller is cancelled, so is the work."""
        return await self._turns.run(partial(self._verify, _encode(job, self._timeout_s)))

    async def close(self) -> None:
        """Kill whatever is under way; at once, and for good."""
        await self._turns.close()
        await asyncio.gather(*(worker.end() for worker in self._idle))
        self._idle.clear()

    async def _verify(self, encoded: bytes) -> Verified:
        worker, is_sound = await self._worker(), False
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await worker.ask(encoded)
            is_sound = True
        except TimeoutError:
            raise GivenUp(
                f"verifying the adapter took more than {self._timeout_s:g} s and was given up "
                "(--verify-timeout-s); large files take long to read, and so do many or costly patterns"
            ) from None
        except WorkerEnded:
            raise GivenUp(
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

    async def _worker(self) -> Worker[Answer]:
        while self._idle:
            worker = self._idle.pop()
            if worker.is_alive:
                return worker
            await worker.end()
        try:
            return await Worker.start("adapters_store.verify", _ANSWERS)
        except (WorkerEnded, OSError) as error:  # a TimeoutError is an OSError
            log.error("a process to verify an adapter did not start: %r", error)
            raise GivenUp(
                "the adapter could not be verified: the process for that did not start, which the server's log explains"
            ) from None


def _encode(job: Job, timeout_s: float) -> bytes:
    try:
        return msgspec.msgpack.encode(msgspec.structs.replace(job, cpu_seconds=math.ceil(timeout_s) + 1))
    except UnicodeEncodeError:
        raise InvalidAdapter("the path is not UTF-8; rename the directory") from None
