"""Front and engine in one process, a thread each."""

import asyncio
import queue

import msgspec

from server.engine.messages import FromFront, ToEngine, ToFront


class QueueLink:
    """Both ends of the link in one process; every message goes through the codec as it would between two."""

    def __init__(self) -> None:
        self._to_engine: queue.Queue[bytes] = queue.Queue()
        self._to_front: asyncio.Queue[bytes] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def send(self, message: FromFront) -> None:
        self._to_engine.put(msgspec.msgpack.encode(message))

    async def receive(self) -> ToFront:
        return msgspec.msgpack.decode(await self._to_front.get(), type=ToFront)  # type: ignore[arg-type]

    def publish(self, message: ToFront) -> None:
        self._loop.call_soon_threadsafe(self._to_front.put_nowait, msgspec.msgpack.encode(message))

    def receive_all(self, timeout_ms: int) -> list[ToEngine]:
        frames: list[bytes] = []
        try:
            frames.append(self._to_engine.get(timeout=max(timeout_ms, 1) / 1000))
            while True:
                frames.append(self._to_engine.get_nowait())
        except queue.Empty:
            return [msgspec.msgpack.decode(frame, type=ToEngine) for frame in frames]  # type: ignore[arg-type]
