"""A client of OpenAI's streaming completions that costs little: it stamps events as they come and reads them later."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from benchmarks.peers.load import Answer, Load
from benchmarks.workload import Job

_SPELLED = re.compile(r"<(\d+)>")  # workload.py's tokenizer
SECONDS = 900.0
Body = Callable[[Job, int], Mapping[str, Any]]
Event = tuple[float, bytes]


class Refused(Exception):
    """A server did not do what was asked."""


def run(port: int, load: Load, body: Body) -> list[Answer]:
    return asyncio.run(_run(port, load, body))


async def _run(port: int, load: Load, body: Body) -> list[Answer]:
    start = time.perf_counter()

    async def one(index: int, job: Job) -> tuple[float, list[Event]]:
        await asyncio.sleep(max(0.0, load.due(index) - (time.perf_counter() - start)))
        sent = time.perf_counter()
        return sent, await asyncio.wait_for(events(port, body(job, load.new_tokens)), SECONDS)

    told = await asyncio.gather(*(one(index, job) for index, job in enumerate(load.jobs)))
    return [read(sent - start, [(at - start, data) for at, data in found]) for sent, found in told]


async def events(port: int, body: Mapping[str, Any], path: str = "/v1/completions") -> list[Event]:
    """Of one stream; what came before it was cancelled is kept. Raises Refused."""
    found: list[Event] = []
    with suppress(asyncio.CancelledError):
        async for event in stream(port, body, path):
            found.append(event)
    return found


async def stream(port: int, body: Mapping[str, Any], path: str = "/v1/completions") -> AsyncIterator[Event]:
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    head = (f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n")  # fmt: skip
    try:
        writer.write(head.encode() + content)
        answer = (await reader.readuntil(b"\r\n\r\n")).lower()
        if b" 200 " not in answer.split(b"\r\n")[0]:
            raise Refused(f"{answer.splitlines()[0].decode()}: {(await reader.read(500)).decode(errors='replace')}")
        pieces = _chunks(reader) if b"transfer-encoding: chunked" in answer else _whole(reader)
        tail = b""
        async for piece in pieces:
            at, (*lines, tail) = time.perf_counter(), (tail + piece).split(b"\n")
            for line in lines:
                if line.startswith(b"data: {"):
                    yield at, line[6:]
                elif line.startswith(b"data: [DONE]"):
                    return
    finally:
        writer.close()


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await reader.readline()).split(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def _whole(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while piece := await reader.read(1 << 16):
        yield piece


async def ask(port: int, method: str, path: str, body: object = None) -> None:
    """A short request whose answer is not read beyond its status. Raises Refused."""
    content = b"" if body is None else json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n")  # fmt: skip
    try:
        writer.write(head.encode() + content)
        told = await reader.read()
        if not told.split(b" ", 2)[1:2][0].startswith(b"2"):
            raise Refused(f"{method} {path}: {told[-300:].decode(errors='replace')}")
    finally:
        writer.close()


def read(sent: float, found: Sequence[Event]) -> Answer:
    """Of a stream's events."""
    tokens: list[int] = []
    times: list[float] = []
    for at, data in found:
        event = json.loads(data)
        if "error" in event:
            raise Refused(str(event["error"]))
        ids = [int(it) for choice in event.get("choices", ()) for it in _SPELLED.findall(choice.get("text") or "")]
        tokens += ids
        times += [at] * len(ids)
    return Answer(tokens, sent, times[-1] if times else sent, times)
