"""The server's side of fetching: what is allowed, and a process for each adapter, which is killed when its time is up,
its client has left, or the server stops."""

import asyncio
import logging
import math
from contextlib import suppress
from functools import partial
from pathlib import Path

import msgspec

from adapters_store.errors import SourceFailed, UploadNotFound
from adapters_store.sources import Fetched, FetchLimits
from adapters_store.sources.allowed import Allowed, Reference, allowed_reference
from adapters_store.sources.fetch import Answer, FetchJob, NotFetched
from adapters_store.uploads import Uploads
from adapters_store.worker import Busy, Closed, Turns, Worker, WorkerEnded

log = logging.getLogger("heddle.adapters")
_ANSWERS: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
_ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_XET": "1",  # it keeps a cache of its own, and speaks to servers that nobody has named
    "HF_HUB_VERBOSITY": "error",
}
FetcherBusy, FetcherClosed = Busy, Closed


class Fetcher:
    """Fetches what `allowed` names, `timeout_s` seconds each at most from when its turn has come, start of the process
    included."""

    def __init__(
        self, allowed: Allowed, limits: FetchLimits, timeout_s: float, num_workers: int = 2, max_waiting: int = 16
    ) -> None:
        self._allowed, self._limits, self._timeout_s = allowed, limits, timeout_s
        self._turns = Turns(num_workers, max_waiting)

    async def fetch(self, reference: str, into: Path) -> Fetched:
        """Write the adapter's files into an empty directory, which on failure is the caller's to clear.

        Raises AdapterError (SourceRefused before anything is begun), FetcherBusy or FetcherClosed. If the caller is
        cancelled, so is the work.
        """
        wanted = allowed_reference(reference, self._allowed)
        fetched = await self._turns.run(partial(self._fetch, wanted, into))
        log.info("fetched %s:%s", wanted.source, fetched.resolved)
        return fetched

    async def fetch_as_upload(self, reference: str, uploads: Uploads) -> tuple[str, Fetched]:
        """A new upload's id, with the adapter's files in it; on failure none is left. Raises TooManyUploads too."""
        allowed_reference(reference, self._allowed)  # before there is anything to clear
        upload_id = (await uploads.create()).id
        try:
            return upload_id, await self.fetch(reference, await uploads.path(upload_id))
        except BaseException:
            with suppress(UploadNotFound):
                await uploads.delete(upload_id)
            raise

    async def close(self) -> None:
        """Kill whatever is under way; at once, and for good."""
        await self._turns.close()

    async def _fetch(self, wanted: Reference, into: Path) -> Fetched:
        cpu_seconds = math.ceil(self._timeout_s) + 1
        job = FetchJob(wanted.source, wanted.rest, str(into), self._limits, cpu_seconds)
        worker: Worker[Answer] | None = None
        try:
            async with asyncio.timeout(self._timeout_s):
                worker = await Worker.start("adapters_store.sources.fetch", _ANSWERS, _ENVIRONMENT)
                answer = await worker.ask(msgspec.msgpack.encode(job))
        except TimeoutError:
            raise SourceFailed(
                f"fetching the adapter took more than {self._timeout_s:g} s and was given up; try again later, or "
                "upload its files"
            ) from None
        except (WorkerEnded, OSError) as error:
            log.error("a process to fetch an adapter did not start, or ended: %r", error)
            raise SourceFailed(
                "fetching the adapter ended the process that did it; the server's log says more"
            ) from None
        finally:
            if worker is not None:
                await worker.end()
        if isinstance(answer, NotFetched):
            if answer.details:
                log.error("an adapter could not be fetched: %s", answer.details)
            raise answer.error()
        return answer
