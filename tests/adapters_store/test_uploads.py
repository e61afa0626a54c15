"""Uploads on disk: how far files have come, what is refused while it is written, and who may write."""

import asyncio
import errno
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from adapters_store.errors import (
    FileNameRefused,
    StoreFull,
    UnsupportedAdapter,
    UploadConflict,
    UploadNotFound,
    UploadTooLarge,
)
from adapters_store.upload_files import TooManyUploads, UploadFile, UploadLimits
from adapters_store.uploads import PIECE_BYTES, Uploads

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LIMITS = UploadLimits(max_upload_bytes=2_000_000, max_files=3, max_uploads=2, max_writers=2)


def run(directory: Path, test: Callable[[Uploads], Coroutine[Any, Any, None]], limits: UploadLimits = LIMITS) -> None:
    async def body() -> None:
        uploads = Uploads(directory, limits)
        try:
            async with asyncio.timeout(20):
                await test(uploads)
        finally:
            uploads.close()

    asyncio.run(body())


async def pieces(*data: bytes, then: BaseException | None = None) -> AsyncIterator[bytes]:
    for piece in data:
        yield piece
    if then is not None:
        raise then


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_file_that_broke_off_goes_on_where_it_ended_also_in_another_process(tmp_path: Path) -> None:
    first, second, ids = os.urandom(PIECE_BYTES + 7), os.urandom(1000), []

    async def breaks_off(uploads: Uploads) -> None:
        upload = await uploads.create()
        ids.append(upload.id)
        assert (upload.files, upload.num_bytes) == ({}, 0)
        assert await uploads.append(upload.id, CONFIG, 0, pieces(b"{", b"}")) == 2
        with pytest.raises(ConnectionError):
            await uploads.append(upload.id, WEIGHTS, 0, pieces(first, then=ConnectionError()))

    async def goes_on(uploads: Uploads) -> None:
        assert (await uploads.get(ids[0])).files == {CONFIG: 2, WEIGHTS: len(first)}
        for wrong in (0, len(first) - 1, len(first) + 1):
            with pytest.raises(UploadConflict, match=f"continue at {len(first):,}, not at {wrong:,}") as conflict:
                await uploads.append(ids[0], WEIGHTS, wrong, pieces(b"x"))
            assert conflict.value.offset == len(first)
        assert await uploads.append(ids[0], WEIGHTS, len(first), pieces(second)) == len(first) + len(second)
        path = await uploads.path(ids[0])
        assert path.parent == (tmp_path / "uploads").resolve() and (path / WEIGHTS).read_bytes() == first + second
        assert await uploads.replace(ids[0], WEIGHTS, pieces(b"short")) == 5
        assert (path / WEIGHTS).read_bytes() == b"short" and (path / WEIGHTS).stat().st_mode & 0o777 == 0o600
        await uploads.delete(ids[0])
        assert os.listdir(tmp_path / "uploads") == []

    before = open_files()
    run(tmp_path / "uploads", breaks_off)
    run(tmp_path / "uploads", goes_on)
    assert open_files() == before


@pytest.mark.parametrize("wrong_id", ["", ".", "..", "x", "a" * 31, "a" * 32, "../" + "a" * 29, "a" * 31 + "\n"])
def test_an_id_that_is_none_is_not_found(tmp_path: Path, wrong_id: str) -> None:
    async def test(uploads: Uploads) -> None:
        for call in (uploads.get, uploads.delete, uploads.path):
            with pytest.raises(UploadNotFound):
                await call(wrong_id)
        with pytest.raises(UploadNotFound):
            await uploads.replace(wrong_id, CONFIG, pieces(b"x"))

    run(tmp_path, test)
    assert os.listdir(tmp_path) == []


def test_names_that_no_file_of_an_adapter_has_are_refused(tmp_path: Path) -> None:
    async def test(uploads: Uploads) -> None:
        upload = (await uploads.create()).id
        for name in ("", ".", "..", "../a.safetensors", "a/b.safetensors", ".a.safetensors", "-a.safetensors",
                     "a\0.safetensors", "ä.safetensors", "README.md", "x.json", "a.safetensors\n", "a" * 129,
                     "a" * 117 + ".safetensors", "ADAPTER_CONFIG.JSON"):  # fmt: skip
            with pytest.raises(FileNameRefused):
                await uploads.replace(upload, name, pieces(b"x"))
        for name in ("adapter_model.bin", "a.pt", "a.pth", "a.ckpt", "a.pkl", "A.PKL"):
            with pytest.raises(UnsupportedAdapter, match="save as safetensors"):
                await uploads.replace(upload, name, pieces(b"x"))
        assert (await uploads.get(upload)).files == {}
        for name in ("expert_cfg.json", "model.safetensors.index.json", "a" * 116 + ".safetensors"):
            await uploads.replace(upload, name, pieces(b"x"))

    run(tmp_path, test)


def test_a_link_is_never_followed(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    canary.write_bytes(b"untouched")

    async def test(uploads: Uploads) -> None:
        upload = (await uploads.create()).id
        directory = await uploads.path(upload)
        (directory / WEIGHTS).symlink_to(canary)
        for offset in (None, 0, 9):
            with pytest.raises((FileNameRefused, UploadConflict)):
                async with uploads.writing(upload, WEIGHTS, offset) as writer:
                    await writer.write(b"x")
        elsewhere = directory.parent / ("b" * 32)
        elsewhere.symlink_to(tmp_path)
        with pytest.raises(UploadNotFound):
            await uploads.replace(elsewhere.name, CONFIG, pieces(b"x"))

    run(tmp_path / "uploads", test)
    assert canary.read_bytes() == b"untouched" and not (tmp_path / CONFIG).exists()


def test_bytes_and_files_are_counted_before_they_are_written(tmp_path: Path) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 65536

    async def test(uploads: Uploads) -> None:
        upload = (await uploads.create()).id
        await uploads.replace(upload, CONFIG, pieces(b"x" * 1_000_000))
        with pytest.raises(UploadTooLarge, match="at most 2,000,000 are taken"):
            await uploads.replace(upload, WEIGHTS, endless())
        assert 700_000 < (await uploads.get(upload)).files[WEIGHTS] <= 1_000_000
        await uploads.replace(upload, WEIGHTS, pieces(b"x" * 1_000_000))  # exactly as much as may be
        await uploads.replace(upload, "expert_cfg.json", pieces())
        with pytest.raises(UploadTooLarge, match="3 files, which is as many as may be"):
            await uploads.replace(upload, "heddle.json", pieces())
        await uploads.replace(upload, CONFIG, pieces(b"{}"))  # one that is there already

    run(tmp_path, test)


def test_no_more_uploads_and_writers_than_may(tmp_path: Path) -> None:
    async def test(uploads: Uploads) -> None:
        upload, _ = [(await uploads.create()).id for _ in range(2)]
        with pytest.raises(TooManyUploads, match="2 uploads"):
            await uploads.create()
        async with uploads.writing(upload, CONFIG), uploads.writing(upload, WEIGHTS):
            with pytest.raises(TooManyUploads, match="2 files"):
                await uploads.replace(upload, "heddle.json", pieces())
        await uploads.replace(upload, "heddle.json", pieces())
        await uploads.delete(upload)
        await uploads.create()

    run(tmp_path, test)


def test_what_is_idle_is_swept_away(tmp_path: Path) -> None:
    async def test(uploads: Uploads) -> None:
        old, fresh = [(await uploads.create()).id for _ in range(2)]
        await uploads.replace(old, CONFIG, pieces(b"{}"))
        await uploads.replace(fresh, CONFIG, pieces(b"{}"))
        long_ago = time.time() - LIMITS.idle_s - 5
        os.utime(tmp_path / old / CONFIG, (long_ago, long_ago))
        os.utime(tmp_path / fresh, (long_ago, long_ago))
        assert await uploads.sweep() == 0  # the directory has changed since, or the file has
        os.utime(tmp_path / old, (long_ago, long_ago))
        assert (await uploads.create()).id != old  # it has made room
        assert not (tmp_path / old).exists() and (tmp_path / fresh).exists()

    run(tmp_path, test)


def test_the_newer_of_two_writers_has_the_file(tmp_path: Path) -> None:
    """The older one's connection may be dead, and nobody know it yet."""

    async def test(uploads: Uploads) -> None:
        upload = (await uploads.create()).id
        with pytest.raises(UploadConflict, match="another request has begun to write"):
            async with uploads.writing(upload, WEIGHTS, 0) as dead:
                await dead.write(b"x" * PIECE_BYTES)
                await uploads.append(upload, WEIGHTS, PIECE_BYTES, pieces(b"new"))
                await dead.write(b"y" * PIECE_BYTES)
        assert ((await uploads.path(upload)) / WEIGHTS).read_bytes() == b"x" * PIECE_BYTES + b"new"
        with pytest.raises(UploadNotFound):
            async with uploads.writing(upload, WEIGHTS) as writer:
                await uploads.delete(upload)
                await writer.write(b"x" * PIECE_BYTES)
        assert os.listdir(tmp_path) == []

    before = open_files()
    run(tmp_path, test)
    assert open_files() == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_and_keeps_what_it_had_room_for(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, room = os.pwrite, [100_000]

    def limited(descriptor: int, data: memoryview, offset: int) -> int:
        if room[0] == 0:
            raise OSError(number, "no room")
        count = pwrite(descriptor, data[: room[0]], offset)
        room[0] -= count
        return count

    async def test(uploads: Uploads) -> None:
        upload = (await uploads.create()).id
        monkeypatch.setattr(os, "pwrite", limited)
        with pytest.raises(StoreFull, match="full"):
            await uploads.replace(upload, WEIGHTS, pieces(b"x" * 300_000))
        assert (await uploads.get(upload)).files == {WEIGHTS: 100_000}
        room[0] = 1 << 30
        assert await uploads.append(upload, WEIGHTS, 100_000, pieces(b"x" * 200_000)) == 300_000

    run(tmp_path, test)


def test_whoever_is_cancelled_waits_for_the_thread_and_the_loop_waits_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on, write = threading.Event(), UploadFile.write

    def slow(file: UploadFile, data: bytes) -> None:
        may_go_on.wait(10)
        write(file, data)

    async def test(uploads: Uploads) -> None:
        upload = (await uploads.create()).id
        monkeypatch.setattr(UploadFile, "write", slow)
        writing = asyncio.create_task(uploads.replace(upload, WEIGHTS, pieces(b"x" * PIECE_BYTES)))
        await asyncio.sleep(0.1)
        writing.cancel()
        await asyncio.sleep(0.1)
        assert not writing.done()
        may_go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await writing
        assert (await uploads.get(upload)).files == {WEIGHTS: PIECE_BYTES}

    before = open_files()
    run(tmp_path, test)
    assert open_files() == before
