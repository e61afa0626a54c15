"""Adapters on their way in, a file and a piece at a time. The event loop hands over bytes; threads write them.

A sender whose connection breaks asks how far a file has come and goes on from there. Until the server notices that the
old connection is dead, two requests may hold one file: the newer one has it, the older one is refused at its next
piece.
"""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar
from weakref import WeakValueDictionary

from adapters_store.errors import UploadConflict
from adapters_store.upload_files import TooManyUploads, Upload, UploadFile, UploadFiles, UploadLimits

PIECE_BYTES = 256 << 10  # gathered before a thread is asked to write; a connection hands over about as much at once
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Uploads:
    """Uploads under `directory`, which is theirs alone. Raises AdapterError and TooManyUploads."""

    def __init__(self, directory: Path, limits: UploadLimits | None = None) -> None:
        self.limits = limits or UploadLimits()
        self._files = UploadFiles(directory, self.limits)
        self._threads = ThreadPoolExecutor(2, "uploads")
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by upload
        self._writers: dict[tuple[str, str], FileWriter] = {}  # by upload and file: who may write it
        self._num_writers = 0

    async def create(self) -> Upload:
        """Also sweeps away what has been idle for too long."""
        return await self._in_thread(self._files.create)

    async def get(self, upload_id: str) -> Upload:
        return await self._in_thread(self._files.read, upload_id)

    async def path(self, upload_id: str) -> Path:
        """The directory with its files, absolute and free of links."""
        await self.get(upload_id)
        return self._files.directory / upload_id

    async def delete(self, upload_id: str) -> None:
        async with self._turn(upload_id):
            await self._in_thread(self._files.delete, upload_id)

    async def sweep(self) -> int:
        return await self._in_thread(self._files.sweep)

    async def replace(self, upload_id: str, name: str, pieces: AsyncIterable[bytes]) -> int:
        """Write the whole file anew; returns its size. If `pieces` fail, what came before is kept."""
        return await self._write(upload_id, name, None, pieces)

    async def append(self, upload_id: str, name: str, offset: int, pieces: AsyncIterable[bytes]) -> int:
        """Go on from `offset`, where the file must end; returns its new size. If `pieces` fail, what came before is
        kept. Raises UploadConflict where the file ends elsewhere."""
        return await self._write(upload_id, name, offset, pieces)

    @asynccontextmanager
    async def writing(self, upload_id: str, name: str, offset: int | None = None) -> AsyncIterator["FileWriter"]:
        """A file to be written from `offset`, or from its start and anew if that is None."""
        if self._num_writers >= self.limits.max_writers:
            raise TooManyUploads(f"{self._num_writers} files are being received, which is as many as may at once")
        writer, key = FileWriter(self, upload_id), (upload_id, name)
        self._num_writers += 1
        try:
            async with self._turn(upload_id):
                await self._in_thread(writer.open, self._files, name, offset)
                self._writers[key] = writer
            try:
                yield writer
            finally:
                await writer.flush()
        finally:
            self._num_writers -= 1
            if self._writers.get(key) is writer:
                del self._writers[key]
            writer.close()

    def close(self) -> None:
        """Start no more work; what is on disk stays."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _write(self, upload_id: str, name: str, offset: int | None, pieces: AsyncIterable[bytes]) -> int:
        async with self.writing(upload_id, name, offset) as writer:
            async for piece in pieces:
                await writer.write(piece)
        return writer.offset

    async def _write_piece(self, writer: "FileWriter", file: UploadFile, piece: bytearray) -> None:
        async with self._turn(writer.upload_id):
            if self._writers.get((writer.upload_id, file.name)) is not writer:
                raise UploadConflict(f"another request has begun to write {file.name}", file.offset)
            await self._in_thread(file.write, piece)

    def _turn(self, upload_id: str) -> asyncio.Lock:
        """One thread at a time is at the files of an upload: sizes are counted before a piece is written."""
        turn = self._turns.get(upload_id)
        if turn is None:
            turn = self._turns[upload_id] = asyncio.Lock()
        return turn

    async def _in_thread(
        self, work: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """A thread cannot be called back: whoever is cancelled waits for its end, and so do its turn and its file."""
        working = asyncio.get_running_loop().run_in_executor(self._threads, partial(work, *args, **kwargs))
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            await asyncio.wait((working,))
            raise


class FileWriter:
    """A request's hold on a file. It gathers what arrives into pieces."""

    def __init__(self, uploads: Uploads, upload_id: str) -> None:
        self.upload_id = upload_id
        self._uploads = uploads
        self._file: UploadFile | None = None
        self._gathered = bytearray()

    @property
    def offset(self) -> int:
        """Bytes of the file that are on disk."""
        return self._file.offset if self._file else 0

    def open(self, files: UploadFiles, name: str, offset: int | None) -> None:
        self._file = files.open(self.upload_id, name, offset)

    async def write(self, data: bytes) -> None:
        self._gathered += data
        if len(self._gathered) >= PIECE_BYTES:
            await self.flush()

    async def flush(self) -> None:
        piece, self._gathered = self._gathered, bytearray()  # first: what is refused is not tried twice
        if piece and self._file is not None:
            await self._uploads._write_piece(self, self._file, piece)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
