"""What a connection may take: its place among the others, and time to send a request and to read the answer.

uvicorn waits for ever for a request's head, for its body and for a client that does not read. Here each has a limit,
and when every place is taken, the connection that has been silent longest gives way to a new one: a thousand sockets
that say nothing keep nobody out.
"""

import asyncio
import logging
import sys
from dataclasses import dataclass
from typing import Any

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from server.api.transport.errors import error_body
from server.api.transport.file_bodies import carries_files

log = logging.getLogger("heddle.api")
MIN_FILE_BYTES_PER_S = 4096  # of a body of files: less is no sender in earnest, and keeps a place from others
LINGER_S = 1.0  # for a refused client to read why, before its unread bytes make the kernel reset the connection


@dataclass(frozen=True)
class ConnectionLimits:
    """Seconds from the first byte of a request to the end of its head, from there to the end of its body, and for which
    the answer may wait for its reader; a connection that says nothing at all has as long as for a head. A body of files
    has no end to be at, but must not stall: `body_s` is then for a least number of bytes, again and again."""

    max_connections: int
    header_s: float
    body_s: float
    write_s: float


def limited(limits: ConnectionLimits) -> type[H11Protocol]:
    """The protocol class for uvicorn's `http`, which makes one instance for each connection."""
    return type("LimitedConnection", (Connection,), {"limits": limits})


class Connection(H11Protocol):
    limits: ConnectionLimits

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._phase: tuple[object, bool] | None = None
        self._deadline: asyncio.TimerHandle | None = None  # of the phase
        self._unread: asyncio.TimerHandle | None = None  # of an answer that waits for its reader
        self._num_received = 0  # bytes, since the deadline was set
        self._is_refused = False
        self.silent_since = self.loop.time()

    # -- asyncio's calls ---

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        has_place = len(self.connections) < self.limits.max_connections or self._take_place()
        super().connection_made(transport)
        # tell us of every byte that is not read: below its own threshold asyncio would say nothing, and a connection
        # that closes would keep its place as long as its client likes
        transport.set_write_buffer_limits(high=0)
        if has_place:
            self._watch()
        else:  # no time to linger: files for connections are what has run out
            self._refuse(503, f"all {self.limits.max_connections} connections are in use", "overloaded", linger_s=0)

    def data_received(self, data: bytes) -> None:
        if not self._is_refused:
            self._num_received += len(data)
            super().data_received(data)
            self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self.limits.write_s, self._give_up_writing)

    def resume_writing(self) -> None:
        super().resume_writing()
        _cancel(self._unread)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        _cancel(self._deadline)
        _cancel(self._unread)

    # -- time ---

    @property
    def is_silent(self) -> bool:
        """Whether it owes us a request and nothing is under way for it."""
        return self.conn.their_state is h11.IDLE and not self._is_refused

    def _watch(self) -> None:
        """Begin another phase's time if another phase has begun."""
        state = self.conn.their_state
        phase = (state, self._has_begun_a_head)
        if self._is_refused or self.transport.is_closing() or phase == self._phase:
            return
        self._phase = phase
        self.silent_since = self.loop.time()
        _cancel(self._deadline)
        if state is h11.IDLE or state is h11.SEND_BODY:
            self._set_deadline(self.limits.header_s if state is h11.IDLE else self.limits.body_s)

    def _set_deadline(self, limit: float) -> None:
        self._num_received = 0
        self._deadline = self.loop.call_later(limit, self._give_up_reading, limit)

    @property
    def _has_begun_a_head(self) -> bool:
        return self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])

    @property
    def _awaits_files(self) -> bool:
        """Whether a body of files arrives, and nobody has refused it."""
        is_awaited = self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.SEND_RESPONSE
        return is_awaited and carries_files(self.scope["method"], self.scope["path"], self.scope["headers"])

    @property
    def _is_in_pace(self) -> bool:
        """Whether bytes arrive as fast as they must, or wait for our disk."""
        return self.flow.read_paused or self._num_received >= MIN_FILE_BYTES_PER_S * self.limits.body_s

    def _give_up_reading(self, limit: float) -> None:
        if self._awaits_files and self._is_in_pace:
            self._set_deadline(limit)
        elif self.conn.their_state is h11.IDLE and not self._has_begun_a_head:
            self.transport.close()  # it never asked for anything
        elif self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            what = "head" if self.conn.their_state is h11.IDLE else "body"
            pace = " as fast as it must" if self._awaits_files else ""
            self._refuse(408, f"the {what} of the request did not arrive{pace} within {limit:g} s", "request_timeout")
        else:
            self.transport.abort()  # an answer has begun

    def _give_up_writing(self) -> None:
        log.debug("an answer was left unread for %g s; its connection is closed", self.limits.write_s)
        self.transport.abort()

    # -- places ---

    def _take_place(self) -> bool:
        """Close the connection that has been silent longest. False if something is under way on all of them."""
        silent = [it for it in self.connections if isinstance(it, Connection) and it.is_silent]
        if silent:
            oldest = min(silent, key=lambda it: it.silent_since)
            self.connections.discard(oldest)
            oldest.transport.abort()
        return bool(silent)

    # -- refusals ---

    def send_400_response(self, msg: str) -> None:
        """uvicorn's call when what arrives is not HTTP; made while h11's error is handled, which knows more."""
        error = sys.exception()
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        what = "the head of the request is too large" if status == 431 else "this is not a sound HTTP request"
        self._refuse(status, what, "invalid_http")

    def _refuse(self, status: int, message: str, code: str, linger_s: float = LINGER_S) -> None:
        """Answer in the shape of every other error, and end the connection."""
        self._is_refused = True
        _cancel(self._deadline)
        kind = "service_unavailable" if status == 503 else "invalid_request_error"
        body = msgspec.json.encode(error_body(message, kind, code=code))
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close")]
        if status == 503:
            headers.append(("Retry-After", "1"))
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            is_head = self.cycle is not None and self.cycle.scope["method"] == "HEAD"
            head = h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status])
            for event in (head, h11.Data(data=b"" if is_head else body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None and not self.cycle.response_complete:  # the application waits for the body
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.flow.resume_reading()
        self._deadline = self.loop.call_later(linger_s, self.transport.close)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
