"""How bytes get to their place on the device."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from server.weights.finite import ROOM_BYTES, are_finite_on_host, flat

# fill the view with the tensor's bytes from this offset on. Every byte is asked for once, in order: it is hashed then
Read = Callable[[memoryview, int], None]

BUFFER_BYTES = 32 << 20
_ALIGN = 64  # bytes between tensors in a buffer: any dtype may begin there
_CONVERTED_BYTES = 1 << 19  # at a time, on the host
_ALONE = 1 << 14  # elements that torch converts on this thread alone: for more it would wake a thread for each core


class CopyRun(Protocol):
    """One adapter's copies. All but `join` on the loading thread."""

    def put(self, read: Read, num_bytes: int, dtype: torch.dtype, place: Tensor) -> None:
        """Copy a tensor of `num_bytes` to its place, which may be of another dtype."""

    def put_lasting(self, pieces: Iterable[Tensor], place: Tensor) -> None:
        """Copy a tensor of the place's dtype, which lies in these pieces [bytes] uint8 one after another, to its place,
        which lies in one piece. They stay as they are until the run is complete."""

    def compute(self, step: Callable[[], object]) -> None:
        """Compute something on places, behind the copies so far and before those to come."""

    def are_finite(self, tensors: Sequence[Tensor]) -> bool:
        """Whether all values in these are, behind the copies so far. Each lies in one piece. Waits for the answer."""

    def end(self) -> None:
        """No more is coming; also called after a failure, since copies may be under way."""

    def is_complete(self) -> bool:
        """After `end`: whether all bytes are in place. Does not wait."""

    def join(self) -> None:
        """Whatever is launched from now on may read them. On the thread that launches kernels."""


class Copier(Protocol):
    def begin(self) -> CopyRun:
        """On the thread that launches kernels. What it launched so far may still read what was in these places."""


class HostCopy:
    """The host writes the bytes itself; each call is over when it returns."""

    def __init__(self) -> None:
        # of the loading thread; touched now, so that a load takes no memory but its pages
        self._raw, self._scratch = bytearray(b"\1" * _CONVERTED_BYTES), np.ones(ROOM_BYTES, np.uint8)

    def begin(self) -> "HostCopy":
        return self

    def put(self, read: Read, num_bytes: int, dtype: torch.dtype, place: Tensor) -> None:
        if place.dtype is dtype and place.is_contiguous():
            read(_bytes_of(place).data, 0)  # straight to where it belongs
            return
        if not place.is_contiguous():  # a block of a matrix
            raw = bytearray(num_bytes)
            read(memoryview(raw), 0)
            place.copy_(torch.frombuffer(raw, dtype=dtype).view(place.shape))
            return
        elements = flat(place)
        for begin in range(0, num_bytes, _CONVERTED_BYTES):
            piece = memoryview(self._raw)[: num_bytes - begin]
            read(piece, begin)
            values, first = torch.frombuffer(piece, dtype=dtype), begin // dtype.itemsize
            targets = elements[first : first + len(values)].split(_ALONE)
            torch._foreach_copy_(targets, values.split(_ALONE))

    def put_lasting(self, pieces: Iterable[Tensor], place: Tensor) -> None:
        target, done = _bytes_of(place), 0
        for piece in pieces:  # numpy copies on this thread alone: torch would wake those that compute
            np.copyto(target[done : done + len(piece)], piece.numpy())
            done += len(piece)

    def compute(self, step: Callable[[], object]) -> None:
        step()

    def are_finite(self, tensors: Sequence[Tensor]) -> bool:
        return all(are_finite_on_host(tensor, self._scratch) for tensor in tensors)

    def end(self) -> None:
        pass

    def is_complete(self) -> bool:
        return True

    def join(self) -> None:
        pass


def _bytes_of(place: Tensor) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    return flat(place).view(torch.uint8).numpy()


class _Buffer:
    def __init__(self, memory: Tensor, event: Any) -> None:
        self.memory, self.bytes = memory, memory.numpy().data
        self.copied = event  # recorded behind the last copy out of it; one never recorded is over
        self.used = 0


class PinnedCopy:
    """What is on the host for a moment is read into page-locked buffers, and copied from there on a stream of its own.
    What lasts is copied from where it lies.

    While the device copies out of one buffer the next is filled; a buffer is filled again when the copies out of it
    are over. Small tensors share a buffer, large ones go through in pieces. Other dtypes are converted on the device,
    by way of `scratch`. `buffers` and `scratch` are uint8 and of one size, a multiple of 64.
    """

    def __init__(
        self, buffers: Sequence[Tensor], scratch: Tensor, device: torch.device, cuda: Any = torch.cuda
    ) -> None:
        assert all(len(buffer) == len(scratch) and len(buffer) % _ALIGN == 0 for buffer in buffers)
        self._cuda, self._device = cuda, device
        self._stream = cuda.Stream(device)
        self._buffers = [_Buffer(buffer, cuda.Event(blocking=True)) for buffer in buffers]  # the first is being filled
        self._scratch = scratch

    def begin(self) -> "_PinnedRun":
        self._stream.wait_stream(self._cuda.current_stream(self._device))
        return _PinnedRun(self, self._cuda.Event())

    def put(self, read: Read, num_bytes: int, dtype: torch.dtype, place: Tensor) -> None:
        assert place.numel() * dtype.itemsize == num_bytes
        if not place.is_contiguous():  # a block of a matrix: gathered first, for copies go to whole ranges
            with self._cuda.stream(self._stream):
                gathered = torch.empty_like(place, memory_format=torch.contiguous_format)
            self.put(read, num_bytes, dtype, gathered)
            self.compute(lambda: place.copy_(gathered))
            return
        elements = flat(place)
        done = 0
        while done < num_bytes:
            buffer = self._buffer()
            begin = buffer.used
            count = min(num_bytes - done, len(buffer.bytes) - begin)
            read(buffer.bytes[begin : begin + count], done)
            piece = buffer.memory[begin : begin + count].view(dtype)
            first = done // dtype.itemsize
            self._copy(piece, elements[first : first + len(piece)])
            buffer.used += -(-count // _ALIGN) * _ALIGN
            done += count

    def put_lasting(self, pieces: Iterable[Tensor], place: Tensor) -> None:
        target, done = flat(place).view(torch.uint8), 0
        with self._cuda.stream(self._stream):
            for piece in pieces:  # page-locked
                target[done : done + len(piece)].copy_(piece, non_blocking=True)
                done += len(piece)

    def compute(self, step: Callable[[], object]) -> None:
        with self._cuda.stream(self._stream):
            step()

    def are_finite(self, tensors: Sequence[Tensor]) -> bool:
        """The ends of each tensor's values say it, and take no memory: NaN is both, infinities are one of them."""
        with self._cuda.stream(self._stream):
            ends = [end.float() for tensor in tensors if tensor.numel() for end in torch.aminmax(tensor)]
            return not ends or bool(torch.stack(ends).isfinite().all())

    def record(self, event: Any) -> None:
        event.record(self._stream)

    def make_compute_wait(self, event: Any) -> None:
        self._cuda.current_stream(self._device).wait_event(event)

    def _buffer(self) -> _Buffer:
        """The one that is being filled, which has room."""
        buffer = self._buffers[0]
        if buffer.used == len(buffer.bytes):
            self.record(buffer.copied)
            self._buffers = [*self._buffers[1:], buffer]
            buffer = self._buffers[0]
            buffer.copied.synchronize()
            buffer.used = 0
        return buffer

    def _copy(self, source: Tensor, target: Tensor) -> None:
        with self._cuda.stream(self._stream):
            if source.dtype is not target.dtype:  # torch would convert on the host and copy from pageable memory
                staged = self._scratch[: source.nbytes].view(source.dtype)
                staged.copy_(source, non_blocking=True)
                source = staged
            target.copy_(source, non_blocking=True)


class _PinnedRun:
    def __init__(self, copy: PinnedCopy, landed: Any) -> None:
        self._copy, self._landed = copy, landed

    def put(self, read: Read, num_bytes: int, dtype: torch.dtype, place: Tensor) -> None:
        self._copy.put(read, num_bytes, dtype, place)

    def put_lasting(self, pieces: Iterable[Tensor], place: Tensor) -> None:
        self._copy.put_lasting(pieces, place)

    def compute(self, step: Callable[[], object]) -> None:
        self._copy.compute(step)

    def are_finite(self, tensors: Sequence[Tensor]) -> bool:
        return self._copy.are_finite(tensors)

    def end(self) -> None:
        self._copy.record(self._landed)

    def is_complete(self) -> bool:
        return bool(self._landed.query())

    def join(self) -> None:
        self._copy.make_compute_wait(self._landed)


def pinned_copy(device: torch.device, buffer_bytes: int = BUFFER_BYTES) -> PinnedCopy:
    """For a GPU: two buffers of `buffer_bytes` page-locked on the host, and as many bytes again on the device."""
    buffers = [torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    return PinnedCopy(buffers, torch.empty(buffer_bytes, dtype=torch.uint8, device=device), device)
