"""Answers of the engine that somebody waits for."""

import asyncio
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Answer = TypeVar("Answer")


class Awaited(Generic[Key, Answer]):
    """By what was asked. Several may wait for one answer."""

    def __init__(self) -> None:
        self._waiting: dict[Key, list[asyncio.Future[Answer]]] = {}

    def wait(self, key: Key) -> asyncio.Future[Answer]:
        """What the answer will be. It need not be awaited."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        future.add_done_callback(
            lambda it: it.cancelled() or it.exception()
        )  # else asyncio complains of one that fails
        self._waiting.setdefault(key, []).append(future)
        return future

    def resolve(self, key: Key, answer: Answer) -> None:
        """Nobody need wait for it."""
        for future in self._waiting.pop(key, ()):
            if not future.done():  # its task may have been cancelled
                future.set_result(answer)

    def fail(self, error: Exception) -> None:
        """There will be no answers."""
        waiting, self._waiting = self._waiting, {}
        for future in (future for futures in waiting.values() for future in futures):
            if not future.done():
                future.set_exception(error)

    def __contains__(self, key: Key) -> bool:
        return key in self._waiting
