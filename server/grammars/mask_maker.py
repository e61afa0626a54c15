"""The engine's side of masks: messages to a process that makes them, and the memory that it writes them to.

What the step loop asks takes microseconds, for tokens go out together and masks are read where they lie; but for the
first request that is opened, which starts the process (0.5 to 0.7 ms here, and it comes up by itself), for the death of
one, which is waited for (2 to 3 ms), and where `collect` may wait for masks.
"""

import logging
import os
import select
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from server.engine.masks import Broken, Made, Mask
from server.grammars.mask_messages import (
    Accept,
    Begin,
    Broke,
    Close,
    Closed,
    Frames,
    FromMasks,
    Masked,
    Open,
    Ready,
    ToMasks,
    Unfit,
    framed,
)
from server.grammars.mask_rows import MaskRows, row_bytes_of
from server.grammars.vocabulary_spec import VocabularySpec

log = logging.getLogger("heddle.grammars")
MOST_WAITED_S = 0.005  # for masks of a step that nobody else is in
START_S = 60.0  # for which the process may load the vocabulary
SILENCE_S = 10.0  # for which it may say nothing while a mask is awaited
STUCK_S = 60.0  # for which one mask may be awaited, with its grammar where that is new
_LOOK_MS = 1  # while the device computes, it is looked whether it still does
_FROM_MASKS: msgspec.msgpack.Decoder[list[FromMasks]] = msgspec.msgpack.Decoder(list[FromMasks])
_ROOT = Path(__file__).resolve().parents[2]


@dataclass
class _Opened:
    request_id: int
    ticket: int
    grammar: str
    tokens: Sequence[int]
    row: int | None = None  # None: all rows are taken, by requests that the process has not let go of
    is_ready: bool = False
    since: float = 0.0  # since when its mask is awaited


class MaskMaker:
    """`Masks` of server/engine/masks.py. The process is started with the first request that is opened."""

    def __init__(self, model_dir: Path, vocab_size: int, stop_token_ids: Collection[int], max_requests: int) -> None:
        """max_requests: that are open at once, at most."""
        self._vocabulary = VocabularySpec(str(model_dir), vocab_size, tuple(sorted(stop_token_ids)))
        self._num_rows = 2 * max_requests  # as many again for those that are closed, and not let go of yet
        self._process: MaskProcess | None = None
        self._next_ticket = 0
        self._opened: dict[int, _Opened] = {}  # by request
        self._by_ticket: dict[int, _Opened] = {}
        self._rows_held: dict[int, int] = {}  # by ticket, until the process has let go of it
        self._free: list[int] = []
        self._roomless: deque[_Opened] = deque()
        self._broken: list[Broken] = []
        self._heard = 0.0  # when it last said something
        self._num_made, self._seconds = 0, 0.0

    @property
    def num_open(self) -> int:
        return len(self._opened)

    # -- Masks ----------------------------------------------------------

    def open(self, request_id: int, grammar: str, tokens: Sequence[int]) -> None:
        assert request_id not in self._opened
        self._receive()
        if self._process is None:
            self._start()
        self._next_ticket += 1
        opened = _Opened(request_id, self._next_ticket, grammar, list(tokens), since=time.monotonic())
        self._opened[request_id] = self._by_ticket[opened.ticket] = opened
        self._roomless.append(opened)
        self._give_rooms()
        self._flush()

    def accept(self, request_id: int, token: int) -> None:
        opened = self._opened.get(request_id)
        if opened is None:  # it broke, which the next `poll` tells
            return
        assert opened.is_ready, "a token is chosen with a mask"
        opened.is_ready, opened.since = False, time.monotonic()
        self._say(Accept(opened.ticket, token))  # leaves with the next `poll` or `collect`, with the others of the step

    def close(self, request_id: int) -> None:
        opened = self._opened.get(request_id)
        if opened is not None:
            self._let_go(opened)
            self._flush()
        else:  # it broke, and whoever would be told has left
            self._broken = [it for it in self._broken if it.request_id != request_id]

    def is_ready(self, request_id: int) -> bool:
        opened = self._opened.get(request_id)
        return opened is not None and opened.is_ready

    def poll(self) -> list[Broken]:
        if not self._opened and not self._broken:
            return []
        self._flush()
        self._receive()
        self._check_time()
        broken, self._broken = self._broken, []
        return broken

    def collect(
        self, request_ids: Sequence[int], is_computing: Callable[[], bool], may_wait: bool
    ) -> Mapping[int, Mask]:
        self._flush()
        self._receive()
        while self._awaited(request_ids) and is_computing():
            self._wait(_LOOK_MS)
        if may_wait:
            deadline = time.monotonic() + MOST_WAITED_S
            while self._awaited(request_ids) and time.monotonic() < deadline:
                self._wait(_LOOK_MS)
        return {it: self._mask(self._opened[it]) for it in request_ids if self.is_ready(it)}

    @property
    def made(self) -> Made:
        return Made(self._num_made, self._seconds)

    def stop(self) -> None:
        """End the process; for good."""
        if self._process is not None:
            self._process.stop()
            self._process = None

    # -- requests -------------------------------------------------------

    def _awaited(self, request_ids: Sequence[int]) -> bool:
        return any(it in self._opened and not self._opened[it].is_ready for it in request_ids)

    def _mask(self, opened: _Opened) -> Mask:
        assert self._process is not None and opened.row is not None
        return self._process.rows.row(opened.row)

    def _give_rooms(self) -> None:
        while self._roomless and self._free:
            opened = self._roomless.popleft()
            opened.row = self._rows_held[opened.ticket] = self._free.pop()
            self._say(Open(opened.ticket, opened.row, opened.grammar, list(opened.tokens)))
            opened.grammar, opened.tokens = "", ()

    def _let_go(self, opened: _Opened) -> None:
        del self._opened[opened.request_id], self._by_ticket[opened.ticket]
        if opened.row is None:
            self._roomless.remove(opened)
        else:  # its row is free when the process says that nothing comes into it any more
            self._say(Close(opened.ticket))

    def _break(self, opened: _Opened, reason: str, is_its_own: bool) -> None:
        self._let_go(opened)
        self._broken.append(Broken(opened.request_id, reason, is_its_own))

    # -- the process ----------------------------------------------------

    def _start(self) -> None:
        self._process = MaskProcess(self._vocabulary, self._num_rows)
        self._free = list(range(self._num_rows))
        self._rows_held.clear()

    def _say(self, message: ToMasks) -> None:
        if self._process is not None:
            self._process.outbox.append(message)

    def _flush(self) -> None:
        if self._process is not None and not self._process.flush():
            self._died("it has ended")

    def _wait(self, milliseconds: int) -> None:
        assert self._process is not None
        self._process.wait(milliseconds)
        self._flush()
        self._receive()

    def _receive(self) -> None:
        if self._process is None:
            return
        messages = self._process.receive()
        if messages:
            self._heard = time.monotonic()
        for message in messages:
            self._take(message)
        if self._process is not None and self._process.has_ended:
            self._died("it has ended")

    def _take(self, message: FromMasks) -> None:
        if isinstance(message, Masked):
            self._num_made += 1
            self._seconds += message.seconds
            opened = self._by_ticket.get(message.ticket)
            if opened is not None:
                opened.is_ready = True
        elif isinstance(message, Closed):
            self._free.append(self._rows_held.pop(message.ticket))
            self._give_rooms()
        elif isinstance(message, Broke):
            opened = self._by_ticket.get(message.ticket)
            if opened is not None:
                if not message.is_its_own:
                    log.error("a grammar's masks went wrong: %s", message.reason)
                self._break(opened, message.reason, message.is_its_own)
        elif isinstance(message, Unfit):
            self._died(message.reason)
        else:
            assert isinstance(message, Ready) and self._process is not None
            self._process.is_up = True
            for opened in self._opened.values():  # their time runs from now
                opened.since = time.monotonic()

    def _check_time(self) -> None:
        since = min((it.since for it in self._opened.values() if not it.is_ready), default=None)
        if self._process is None or since is None:
            return
        now = time.monotonic()
        silence_s = SILENCE_S if self._process.is_up else START_S
        if now - max(since, self._heard) > silence_s:
            self._died(f"it said nothing for {silence_s:g} s")
        elif now - since > silence_s + STUCK_S:
            self._died(f"it took more than {STUCK_S:g} s over one mask")

    def _died(self, reason: str) -> None:
        """Nobody's masks come any more. The next request that is opened starts another process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
        log.error("the process that makes masks was given up: %s", reason)
        self._roomless.clear()
        for it in self._opened.values():
            self._broken.append(Broken(it.request_id, f"the process that makes masks was given up: {reason}", False))
        self._opened.clear()
        self._by_ticket.clear()


class MaskProcess:
    """The process, and the link to it."""

    def __init__(self, vocabulary: VocabularySpec, num_rows: int) -> None:
        row_bytes = row_bytes_of(vocabulary.vocab_size)
        memory = MaskRows.new_file(num_rows, row_bytes)
        self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.rows = MaskRows(memory, num_rows, row_bytes)
            # a group of its own: Ctrl-C is for the server, which then ends it
            self._process = subprocess.Popen(
                [sys.executable, "-m", "server.grammars.mask_process", str(theirs.fileno()), str(memory)],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), memory),
                process_group=0,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH")))),
                    "RAYON_NUM_THREADS": "1",
                },
            )
        finally:
            theirs.close()
            os.close(memory)
        self._link.setblocking(False)
        self._poller = select.poll()
        self._poller.register(self._link, select.POLLIN)
        self._frames = Frames(_FROM_MASKS)
        self._unsent = bytearray()
        self.outbox: list[ToMasks] = [Begin(vocabulary, num_rows, row_bytes)]
        self.is_up = self.has_ended = False

    def flush(self) -> bool:
        """Send what is to be said, as far as it goes without waiting. False: the process is gone."""
        if self.outbox:
            self._unsent += framed(self.outbox)
            self.outbox.clear()
        while self._unsent:
            try:
                del self._unsent[: self._link.send(self._unsent)]
            except BlockingIOError:
                break
            except OSError:
                return False
        return True

    def receive(self) -> list[FromMasks]:
        """What has come."""
        messages: list[FromMasks] = []
        try:
            while data := self._link.recv(1 << 16):
                messages += self._frames.push(data)
            self.has_ended = True
        except BlockingIOError:
            pass
        except OSError:
            self.has_ended = True
        return messages

    def wait(self, milliseconds: int) -> None:
        """Until something comes, at most so long."""
        self._poller.poll(milliseconds)

    def stop(self) -> None:
        self._link.close()  # which ends it
        try:
            self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        self._link.close()
        self._process.kill()
        self._process.wait()
