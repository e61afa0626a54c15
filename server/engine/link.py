"""The seam between the two processes: typed messages over one local ZeroMQ pair.

MessagePack by msgspec, never pickle: a message can only be what messages.py lists.
"""

from typing import Generic, TypeVar

import msgspec
import zmq
import zmq.asyncio

from server.engine.messages import FromFront, ToEngine, ToFront

Sent = TypeVar("Sent")
Received = TypeVar("Received")


class _Codec(Generic[Sent, Received]):
    def __init__(self, received: object) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Received] = msgspec.msgpack.Decoder(received)

    def encode(self, message: Sent) -> bytes:
        return self._encoder.encode(message)

    def decode(self, frame: bytes) -> Received:
        return self._decoder.decode(frame)


class EngineLink:
    """The engine's end, for its synchronous loop."""

    def __init__(self, address: str) -> None:
        self._codec: _Codec[ToFront, ToEngine] = _Codec(ToEngine)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.connect(address)

    def send(self, message: ToFront) -> None:
        self._socket.send(self._codec.encode(message))

    def receive_all(self, timeout_ms: int) -> list[ToEngine]:
        """All messages that have arrived; waits at most `timeout_ms` for the first."""
        messages: list[ToEngine] = []
        if self._socket.poll(timeout_ms):
            while True:
                try:
                    messages.append(self._codec.decode(self._socket.recv(zmq.NOBLOCK)))
                except zmq.Again:
                    break
        return messages

    def close(self) -> None:
        self._socket.close()
        self._context.term()


class FrontLink:
    """The front's end, for its event loop."""

    def __init__(self, address: str) -> None:
        self._codec: _Codec[FromFront, ToFront] = _Codec(ToFront)
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.bind(address)

    def send(self, message: FromFront) -> None:
        """Never waits: the queue has no limit, and what enters it is bounded by admission.

        So a request can be aborted from a cleanup path, where awaiting would be a hazard.
        """
        self._socket.send(self._codec.encode(message))

    async def receive(self) -> ToFront:
        return self._codec.decode(await self._socket.recv())

    def close(self) -> None:
        self._socket.close()
        self._context.term()
