"""Adapter bytes from disk or the host's cache to their places, off the step loop."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from adapters_store.errors import clean
from adapters_store.parts import SourceFile, TensorRef
from server.weights.arena import ArenaError, PageWork, log
from server.weights.failures import LoadFailure, UnusableAdapter, failure_of
from server.weights.host_cache import CachedFiles
from server.weights.runs import Run, in_runs
from server.weights.sources import CachedFile, FileBytes, fill, verified
from server.weights.staging import CopyRun
from server.weights.tables.table import Place, Prepared

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class MissingFile(UnusableAdapter):
    """A place that no file fills would be served as it was found."""


class ValuesNotFinite(UnusableAdapter):
    """What is on the device is not what any adapter can be."""


# of each file: all places, and in which steps they are filled
_ByFile = dict[str, tuple[Sequence[Place], Sequence[Run | list[Place]]]]


class _Steps(NamedTuple):
    """What is to be done."""

    tables: Sequence[Prepared]
    by_file: _ByFile


class Transfer:
    """One adapter's way to the device. `done` turns true when it is over; `failure` says why it failed, if it did.

    Three threads work on it (loading.py): one maps its pages, one prepares, one reads and copies. The bytes come from
    `cached`, if that is whole by then; else from disk, and fill it on the way. What comes from disk is hashed: if it is
    not what was verified, the transfer fails, and its places, which nobody looks at yet, are never looked at. With a
    copy to fill it does not even get there.

    `tables` are the `prepare` of those that have parts of it. What they clear becomes zero before anything is copied:
    what of it no place lies in stays so. What they derive is computed of the places when all are filled. At last all
    values must be finite in the type that they have here: files were checked when they were registered, but what was
    converted may have become too large, and a bit may have flipped since it was hashed.
    """

    def __init__(
        self,
        files: Sequence[SourceFile],
        tables: Sequence[Callable[[], Prepared]],
        pages: PageWork,
        copies: CopyRun,
        cached: CachedFiles | None = None,
    ) -> None:
        self._files, self._tables, self._pages = files, tables, pages
        self._copies, self._cached = copies, cached
        self._mapped, self._over = threading.Event(), threading.Event()
        self._prepared: _Steps | None = None
        self._map_error: BaseException | None = None
        self._prepare_error: BaseException | None = None
        self.failure: LoadFailure | None = None
        self.seconds = 0.0  # of work, once it is done
        if cached is not None:
            cached.used_by(self)

    @property
    def done(self) -> bool:
        """Whether nothing is read, mapped or copied any more: only then may its room be used or given back."""
        return self._over.is_set() and self._copies.is_complete()

    def join(self) -> None:
        """Let kernels that are launched from now on read what was copied. Call it when `done`."""
        self._copies.join()

    def map_pages(self) -> None:
        try:
            self._pages.run()
        except BaseException as error:
            self._map_error = error
        finally:
            self._mapped.set()

    def prepare(self) -> None:
        """What the interpreter does for hundreds of tensors. Before `run`, which does it if nobody has."""
        try:
            self._prepared = self._steps([prepare() for prepare in self._tables])
        except BaseException as error:
            self._prepare_error = error

    def run(self) -> None:
        begin = time.monotonic()
        try:
            try:
                self._load()
            finally:
                self._mapped.wait()  # not to be under way when this is over
                self._copies.end()
        except BaseException as error:  # whatever else goes wrong is this adapter's failure, not the engine's
            self.failure = failure_of(error)
        finally:
            self.seconds = time.monotonic() - begin
            self._prepared, self._tables = None, ()  # views keep memory
            self._over.set()

    def _load(self) -> None:
        cached = self._filled()
        self._mapped.wait()
        if self._map_error is not None:
            raise self._map_error
        if self._prepared is None and self._prepare_error is None:
            self.prepare()
        if self._prepare_error is not None:
            raise self._prepare_error
        assert self._prepared is not None
        tables, by_file = self._prepared
        with torch.inference_mode():
            for it in tables:
                for tensor in it.cleared:
                    self._copies.compute(tensor.zero_)
            self._copy(by_file, cached)
            for it in tables:
                for step in it.derive:
                    self._copies.compute(step)
            if not self._copies.are_finite([tensor for it in tables for tensor in it.checked]):
                raise ValuesNotFinite(self._not_finite(by_file))

    def _steps(self, tables: Sequence[Prepared]) -> "_Steps":
        places: dict[str, list[Place]] = {}
        for it in tables:
            for place in it.places:
                places.setdefault(place[0].file, []).append(place)
        missing = sorted(set(places) - {file.file for file in self._files})
        if missing:
            raise MissingFile(f"{clean(missing[0], 200)} is not among the adapter's files; register it again")
        return _Steps(tables, {file: (its, list(in_runs(its))) for file, its in places.items()})

    def _filled(self) -> CachedFiles | None:
        """The copy to read from; None: disk."""
        if self._cached is None:
            return None
        try:
            for _ in fill(self._cached):
                pass
        except ArenaError as error:
            log.error("an adapter is loaded without the host's cache: %s", error)
            return None
        return self._cached

    def _copy(self, by_file: "_ByFile", cached: CachedFiles | None) -> None:
        for number, file in enumerate(self._files):
            with _opened(file, number, cached) as source:
                for it in by_file.get(file.file, ((), ()))[1]:
                    if isinstance(it, Run):
                        self._copy_run(source, it)
                    else:
                        self._copy_blocks(source, it)

    def _copy_run(self, source: FileBytes, run: Run) -> None:
        dtype = _DTYPES[run.dtype]
        pieces = None
        if run.place.dtype is dtype and run.place.is_contiguous():
            pieces = source.lasting(run.offset, run.num_bytes)
        if pieces is not None:
            self._copies.put_lasting(pieces, run.place)
        else:
            self._copies.put(partial(_read, source, run.offset), run.num_bytes, dtype, run.place)

    def _copy_blocks(self, source: FileBytes, places: Sequence[Place]) -> None:
        """What is stored at one offset, to several places or in blocks."""
        first, _ = places[0]
        dtype = _DTYPES[first.dtype]
        raw = bytearray(first.stored_elements * dtype.itemsize)
        source.read(first.offset, memoryview(raw))
        stored = torch.frombuffer(raw, dtype=dtype)
        for tensor, place in places:
            assert tensor.stored_elements == first.stored_elements and tensor.dtype == first.dtype
            bytes_of = _block(stored, tensor).contiguous().view(torch.uint8).numpy().reshape(-1).data
            self._copies.put(partial(_hand_over, bytes_of), tensor.num_bytes, dtype, place)

    def _not_finite(self, by_file: "_ByFile") -> str:
        for places, _ in by_file.values():
            for tensor, place in places:
                if not self._copies.are_finite([place.contiguous()]):
                    kind = str(place.dtype).removeprefix("torch.")
                    return f"{clean(tensor.key, 200)} holds values that are not finite as {kind}; register another"
        return "what is derived of it is not finite"


class Fetch:
    """One adapter's files from disk into host memory, so that a transfer need not wait for the disk."""

    def __init__(self, cached: CachedFiles) -> None:
        self._cached = cached
        self._over = threading.Event()
        self.failure: LoadFailure | None = None
        self.seconds = 0.0  # of work, once it is done
        cached.used_by(self)

    @property
    def done(self) -> bool:
        return self._over.is_set()

    def map_pages(self) -> None:
        """It has none."""

    def prepare(self) -> None:
        """There is nothing to prepare."""

    def run(self) -> None:
        for _ in self.steps():
            pass

    def steps(self) -> Iterator[None]:
        """`run`, with room between steps for what is more urgent: for a transfer of the very same files too."""
        try:
            steps = fill(self._cached)
            while not self._cached.is_whole and not self._cached.is_dropped:
                begin = time.monotonic()
                next(steps, None)
                self.seconds += time.monotonic() - begin
                yield
            if not self._cached.is_whole:
                self.failure = LoadFailure("nobody wants it any more", is_final=False)
        except BaseException as error:
            self.failure = failure_of(error)
        finally:
            self._over.set()


@contextlib.contextmanager
def _opened(file: SourceFile, number: int, cached: CachedFiles | None) -> Iterator[FileBytes]:
    if cached is not None:
        yield CachedFile(cached, number)
    else:
        with verified(file) as source:
            yield source


def _block(stored: Tensor, tensor: TensorRef) -> Tensor:
    """The tensor as a view of what lies at its offset, [stored_elements]."""
    if tensor.cut_from is None:
        return stored
    it = tensor.cut_from
    whole = stored.view(it.shape).permute(it.order or tuple(range(len(it.shape))))
    return whole[tuple(slice(start, start + size) for start, size in zip(it.start, tensor.shape, strict=True))]


def _read(source: FileBytes, start: int, into: memoryview, offset: int) -> None:
    """As staging.Read."""
    source.read(start + offset, into)


def _hand_over(source: memoryview, into: memoryview, offset: int) -> None:
    """As staging.Read, of what is in memory."""
    into[:] = source[offset : offset + len(into)]
