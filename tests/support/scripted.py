"""A generation that yields what a test says, where a route expects one of the engine's."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI, Request, Response

from adapters_store.manifest import PLAIN
from server.api.generating.choice import Piece, TokenTold
from server.api.generating.generation import Usage
from server.api.protocol.wanted import Wanted
from server.api.texts.decoding import TokenText
from server.api.texts.speech import CallPiece, Said
from server.engine.request import Logprobs
from server.lifecycle.models import Meant

MEANT = Meant("tiny", "tiny", None, PLAIN)


def said(text: str = "", reasoning: str = "", calls: Sequence[CallPiece] = (), **more: Any) -> Piece:
    """A piece of an answer in a conversation."""
    return Piece(0, text, said=Said(text, reasoning, calls), **more)


class Numbering:
    """A speaker, as far as answers need one."""

    def __init__(self) -> None:
        self._number = 0

    def new_call_id(self) -> str:
        self._number += 1
        return f"call{self._number:05}"


class ScriptedGeneration:
    """Pieces, None where nothing comes for a while, and errors, which are raised."""

    def __init__(self, *script: Piece | Exception | None) -> None:
        self._script = script
        self.wanted, self.speaker = Wanted(MEANT), Numbering()
        self.service = SimpleNamespace(info=SimpleNamespace(vocab_size=256))
        self.usage = Usage(prompt_tokens=20, completion_tokens=3, cached_tokens=16)
        self.was_closed = False

    async def pieces(self) -> AsyncGenerator[Piece | None]:
        try:
            for it in self._script:
                if isinstance(it, Exception):
                    raise it
                yield it
        finally:
            self.was_closed = True


class Letters:
    """Token texts: a token is its letter."""

    def of(self, token: int) -> TokenText:
        return TokenText(chr(token), chr(token).encode())


def told(text: str, offset: int = 0) -> Sequence[TokenTold]:
    """A token a letter, each with the likelier `z` beside it."""
    return [
        TokenTold(ord(letter), Logprobs(-1.5, 2, [ord("z")], [-0.5]), offset + place)
        for place, letter in enumerate(text)
    ]


def app_at(path: str, answer: Callable[[Request], Awaitable[Response]]) -> FastAPI:
    app: Any = FastAPI()
    app.add_api_route(path, answer, methods=["POST"], response_model=None)
    return app


def typed_events(sent: AsyncGenerator[bytes | None]) -> list[dict[str, Any] | None]:
    """The bodies of events, each under the name of its type. None: a comment."""

    async def read() -> list[dict[str, Any] | None]:
        read: list[dict[str, Any] | None] = []
        async for blocks in sent:
            for block in (blocks or b"event: \ndata: null\n\n").decode().split("\n\n")[:-1]:
                name, data = block.split("\n")
                read.append(json.loads(data.removeprefix("data: ")))
                assert read[-1] is None or name == f"event: {read[-1]['type']}"
        return read

    return asyncio.run(read())
