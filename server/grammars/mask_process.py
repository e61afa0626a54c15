"""Makes masks beside the engine: `python -m server.grammars.mask_process SOCKET MEMORY`, both descriptors.

Each request has a matcher, and what is to be done for it is done in order. Several threads do it, for the library lets
go of the interpreter. A request whose masks take long, and grammars that are compiled, have threads of their own: the
others' masks do not wait for them. The process ends with the engine, whose end of the socket is closed then.
"""

import os
import resource
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import msgspec
from llguidance import LLMatcher, LLTokenizer

from adapters_store.worker_process import limit
from server.grammars import limits, vocabulary, words
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
from server.grammars.matchers import Refusal, matcher_of, require_sound
from server.grammars.prototypes import Prototypes

NICENESS = 2  # so much more than the engine's
SLOW_NICENESS = 5  # of threads for what takes long
_THREADS, _SLOW_THREADS = 4, 3
_STACK_BYTES = 64 << 20  # of a thread: what went well in the compiling process, with 8 MiB, goes well here
_SLOW_S = 0.005  # a request of which a mask took longer is one whose masks take long
_MESSAGES: msgspec.msgpack.Decoder[list[ToMasks]] = msgspec.msgpack.Decoder(list[ToMasks])


class NotAllowed(Exception):
    """The engine went on with a token that the mask did not allow."""


class Ticket:
    """One request's matcher, and what is still to be done for it."""

    def __init__(self, opened: Open) -> None:
        self.id, self.row, self.grammar = opened.ticket, opened.row, opened.grammar
        self.todo: deque[Open | Accept | Close] = deque((opened,))
        self.matcher: LLMatcher | None = None
        self.is_slow = True  # until it is compiled
        self.is_at_work = False


class MaskProcess:
    def __init__(self, link: socket.socket, memory: int) -> None:
        self._link, self._memory = link, memory
        self._rows: MaskRows
        self._vocabulary: LLTokenizer
        self._tickets: dict[int, Ticket] = {}
        self._prototypes = Prototypes(limits.CACHED_MATCHERS, limits.CACHED_MATCHER_BYTES)
        self._lock, self._sending = threading.Lock(), threading.Lock()
        self._quick = ThreadPoolExecutor(_THREADS, "masks")
        self._slow = ThreadPoolExecutor(_SLOW_THREADS, "slow-masks", _give_way)

    def run(self) -> None:
        """Until the engine is gone."""
        frames = Frames(_MESSAGES)
        while data := self._link.recv(1 << 16):
            for message in frames.push(data):
                self._take(message)

    def _take(self, message: ToMasks) -> None:
        if isinstance(message, Begin):
            self._begin(message)
            return
        with self._lock:
            if isinstance(message, Open):
                ticket = self._tickets[message.ticket] = Ticket(message)
            else:
                ticket = self._tickets[message.ticket]
                ticket.todo.append(message)
            if not ticket.is_at_work:
                self._put_to_work(ticket)

    def _begin(self, message: Begin) -> None:
        self._rows = MaskRows(self._memory, message.num_rows, message.row_bytes)
        try:
            self._vocabulary = vocabulary.load(message.vocabulary)
        except vocabulary.NoVocabulary as error:
            self._send(Unfit(str(error)))
            return
        self._send(Ready())

    def _put_to_work(self, ticket: Ticket) -> None:
        ticket.is_at_work = True
        (self._slow if ticket.is_slow else self._quick).submit(self._work, ticket)

    def _work(self, ticket: Ticket) -> None:
        """The ticket's next message. Others' turn comes before the one behind that."""
        with self._lock:
            message = ticket.todo.popleft()
            if ticket.todo and isinstance(ticket.todo[-1], Close):  # what comes before that is for nobody
                message = ticket.todo.pop()
                ticket.todo.clear()
        answer = self._answer(ticket, message)
        with self._lock:
            if isinstance(answer, Closed):
                del self._tickets[ticket.id]
            ticket.is_at_work = False
            if ticket.todo:
                self._put_to_work(ticket)
        self._send(answer)

    def _answer(self, ticket: Ticket, message: Open | Accept | Close) -> FromMasks:
        if isinstance(message, Close):
            ticket.matcher = None
            return Closed(ticket.id)
        begin = time.thread_time()
        try:
            if isinstance(message, Open):
                ticket.matcher = self._matcher(ticket.grammar)
                self._consume(ticket.matcher, message.tokens)
                begin = time.thread_time()  # what follows is a mask like others
            else:
                assert ticket.matcher is not None
                self._consume(ticket.matcher, (message.token,))
            self._fill(ticket)
        except Refusal as refusal:
            self._prototypes.drop(ticket.grammar)  # what it shares with others' matchers may be used up
            return Broke(ticket.id, words.at_a_token(refusal.error), is_its_own=True)
        except NotAllowed:
            return Broke(ticket.id, "a token was chosen that the grammar does not allow", is_its_own=False)
        except BaseException as error:  # a panic of the library's is no Exception
            return Broke(ticket.id, f"making its mask failed: {type(error).__name__}", is_its_own=False)
        seconds = time.thread_time() - begin
        if seconds > limits.MOST_SECONDS_A_TOKEN:
            return Broke(ticket.id, words.TOO_SLOW, is_its_own=True)
        ticket.is_slow = seconds > _SLOW_S
        return Masked(ticket.id, seconds)

    def _matcher(self, grammar: str) -> LLMatcher:
        """Raises Refusal."""
        prototype = self._prototypes.get(grammar)
        if prototype is None:
            prototype = matcher_of(self._vocabulary, grammar)
            self._prototypes.put(grammar, prototype)
        return prototype.deep_copy()

    def _consume(self, matcher: LLMatcher, tokens: Sequence[int]) -> None:
        """Raises NotAllowed, or Refusal where the matcher gives up."""
        for token in tokens:
            if matcher.try_consume_tokens([token]) == 1:
                continue
            require_sound(matcher)
            if not (
                matcher.is_stopped() and token in self._vocabulary.eos_tokens
            ):  # behind its end there are more of these
                raise NotAllowed

    def _fill(self, ticket: Ticket) -> None:
        """The ticket's row. Raises Refusal."""
        matcher, rows = ticket.matcher, self._rows
        assert matcher is not None
        if row_bytes_of(self._vocabulary.vocab_size) == rows.row_bytes:
            matcher.unsafe_compute_mask_ptr(rows.address(ticket.row), rows.row_bytes)
            require_sound(matcher)
            return
        mask = matcher.compute_bitmask()[: rows.row_bytes]  # the tokenizer knows tokens that the model has not
        require_sound(matcher)
        rows.row(ticket.row)[:] = mask

    def _send(self, message: FromMasks) -> None:
        with self._sending, suppress(BrokenPipeError, ConnectionResetError):
            self._link.sendall(framed([message]))


def _give_way() -> None:
    """This thread, to the others."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), SLOW_NICENESS)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the engine says when it is over
        signal.signal(number, signal.SIG_IGN)
    with suppress(OSError):
        os.nice(NICENESS)
    limit(resource.RLIMIT_AS, limits.MASKS_MEMORY_BYTES)
    threading.stack_size(_STACK_BYTES)
    with socket.socket(fileno=int(sys.argv[1])) as link:
        with suppress(ConnectionResetError):
            MaskProcess(link, int(sys.argv[2])).run()
    os._exit(0)  # threads may be in the middle of a mask that nobody wants


if __name__ == "__main__":
    main()
