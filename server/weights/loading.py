"""The threads that load. The step loop only looks whether jobs are done."""

import contextlib
import os
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable
from functools import partial

from server.weights.arena import PageWork, log
from server.weights.transfer import Fetch, Transfer

Job = Transfer | Fetch
_LOWER_PRIORITY = 10  # niceness of the thread that reads and copies: those that compute come first


class Loading:
    """One thread gives pages back and maps them, in the order in which they were counted: that is what makes their
    reuse safe. It does nothing else, so that memory for keys and values never waits behind a copy of gigabytes.

    One prepares transfers: thousands of small objects, for which it holds the interpreter.

    One reads, hashes and copies, and lets go of the interpreter for nearly all of that. So it may have a low priority,
    and takes from those that compute only what they leave. Were it the one that prepares, too, it would be held up with
    the interpreter in its hands, and the step loop behind it. Somebody waits for a transfer, and only may for a fetch:
    transfers come first, each in order.
    """

    def __init__(self) -> None:
        self._pages: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._unprepared: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._prepared: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._transfers: deque[Transfer] = deque()  # these two are the loading thread's
        self._fetches: deque[Fetch] = deque()
        _start("adapter-pages", partial(_in_order, self._pages))
        _start("adapter-prepare", partial(_in_order, self._unprepared))
        _start("adapter-load", self._load)

    def start(self, job: Job) -> None:
        self._pages.put(job.map_pages)
        self._unprepared.put(partial(self._prepare, job))

    def do(self, work: PageWork) -> None:
        self._pages.put(work.run)

    def finish(self, work: PageWork) -> None:
        """Do it in its turn, and wait for it. Raises ArenaError where a map fails."""
        done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        def run() -> None:
            error: BaseException | None = None
            try:
                work.run()
            except BaseException as raised:
                error = raised
            done.put(error)

        self._pages.put(run)
        error = done.get()
        if error is not None:
            raise error

    def _prepare(self, job: Job) -> None:
        job.prepare()
        self._prepared.put(job)

    def _load(self) -> None:
        _lower_priority()
        while True:
            self._sort(wait=not self._fetches)
            if self._transfers:
                self._transfers.popleft().run()
            elif self._fetches:
                for _ in self._fetches.popleft().steps():
                    self._sort(wait=False)
                    while self._transfers:
                        self._transfers.popleft().run()

    def _sort(self, wait: bool) -> None:
        """Take in what has been prepared. wait: for one at least, unless there are transfers."""
        with contextlib.suppress(queue.Empty):
            if wait and not self._transfers:
                self._file(self._prepared.get())
            while True:
                self._file(self._prepared.get_nowait())

    def _file(self, job: Job) -> None:
        if isinstance(job, Transfer):
            self._transfers.append(job)
        else:
            self._fetches.append(job)


def _start(name: str, run: Callable[[], None]) -> None:
    threading.Thread(target=run, name=name, daemon=True).start()


def _in_order(steps: "queue.SimpleQueue[Callable[[], None]]") -> None:
    while True:
        try:
            steps.get()()
        except Exception:  # transfers keep their own errors; the others must not wait for ever for one step's
            log.exception("a step of loading an adapter failed")


def _lower_priority() -> None:
    """Of this thread; on Linux a thread has one of its own. Threads that it makes have it too."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWER_PRIORITY)
