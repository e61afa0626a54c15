"""CUDA without a GPU: a driver whose device memory is a file in the host's memory, and streams that only keep a log.

The driver is as strict as the real one where arenas could go wrong: nothing may be mapped twice, a range that is given
access must be mapped without a gap, memory without access faults. Recycled handles keep what was written to them.
"""

import contextlib
import ctypes
import enum
import os
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

GRANULE = 2 << 20
_PROT_NONE, _PROT_READ_WRITE = 0, 3
_SHARED, _PRIVATE, _FIXED, _ANONYMOUS, _NORESERVE = 0x01, 0x02, 0x10, 0x20, 0x4000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Result(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NOT_PERMITTED = 800
    CUDA_ERROR_NOT_SUPPORTED = 801


OK = Result.CUDA_SUCCESS
NO_MEMORY = Result.CUDA_ERROR_OUT_OF_MEMORY


class FakeBindings:
    """What arenas use of cuda.bindings.driver. `log` has every call as (name, thread, arguments)."""

    CUresult = Result
    CUdevice_attribute = SimpleNamespace(CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED=102)
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED=1)
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE=1)
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3)
    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_MINIMUM=0)

    def __init__(self, total_bytes: int = 64 * GRANULE, has_virtual_memory: bool = True) -> None:
        self.log: list[tuple[str, str, tuple[Any, ...]]] = []
        self.total_bytes, self.has_virtual_memory = total_bytes, has_virtual_memory
        self.failures: dict[str, list[Result]] = {}  # call -> what its next calls return; OK lets one through
        self.reserved: dict[int, int] = {}
        self.mapped: dict[int, int] = {}  # address of a granule -> handle
        self.accessible: set[int] = set()
        self.live: set[int] = set()  # handles
        self._file = os.memfd_create("fake device memory")
        self._next = 0

    def __del__(self) -> None:
        os.close(self._file)

    def __getattribute__(self, name: str) -> Any:
        function = super().__getattribute__(name)
        if not name.startswith("cu"):
            return function

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.log.append((name, threading.current_thread().name, arguments))
            pending = self.failures.get(name)
            if pending and (result := pending.pop(0)) is not OK:
                return (result, *[None] * 2)
            return function(*arguments)  # type: ignore[no-any-return]

        return call

    def calls(self, name: str) -> list[tuple[Any, ...]]:
        return [arguments for called, _, arguments in self.log if called == name]

    def state(self) -> tuple[Any, ...]:
        """Everything that a failed operation must leave as it was. One handle is as good as another."""
        return set(self.mapped), set(self.accessible), len(self.live), dict(self.reserved)

    def CUmemAllocationProp(self) -> SimpleNamespace:
        return SimpleNamespace(type=None, location=SimpleNamespace(type=None, id=None))

    def CUmemAccessDesc(self) -> SimpleNamespace:
        return SimpleNamespace(location=None, flags=None)

    def cuInit(self, flags: int) -> tuple[Any, ...]:
        return (OK,)

    def cuDeviceGet(self, ordinal: int) -> tuple[Any, ...]:
        return OK, ordinal

    def cuDeviceGetAttribute(self, attribute: int, device: int) -> tuple[Any, ...]:
        return OK, int(attribute == 102 and self.has_virtual_memory)

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Any, ...]:
        return OK, "the primary context"

    def cuCtxSetCurrent(self, context: str) -> tuple[Any, ...]:
        assert context == "the primary context"
        return (OK,)

    def cuCtxSynchronize(self) -> tuple[Any, ...]:
        return (OK,)

    def cuMemGetInfo(self) -> tuple[Any, ...]:
        return OK, self.total_bytes - len(self.live) * GRANULE, self.total_bytes

    def cuMemGetAllocationGranularity(self, allocation: SimpleNamespace, option: int) -> tuple[Any, ...]:
        assert allocation.type == allocation.location.type == 1
        return OK, GRANULE

    def cuMemAddressReserve(self, size: int, alignment: int, address: int, flags: int) -> tuple[Any, ...]:
        assert size % GRANULE == 0
        raw = _libc.mmap(None, size + GRANULE, _PROT_NONE, _PRIVATE | _ANONYMOUS | _NORESERVE, -1, 0)
        if raw == ctypes.c_void_p(-1).value:
            return Result.CUDA_ERROR_OUT_OF_MEMORY, None
        base = -(-raw // GRANULE) * GRANULE
        self.reserved[base] = size
        return OK, base

    def cuMemAddressFree(self, address: int, size: int) -> tuple[Any, ...]:
        if self.reserved.get(address) != size or any(address <= it < address + size for it in self.mapped):
            return (Result.CUDA_ERROR_INVALID_VALUE,)
        del self.reserved[address]
        _libc.munmap(address, size)
        return (OK,)

    def cuMemCreate(self, size: int, allocation: SimpleNamespace, flags: int) -> tuple[Any, ...]:
        assert size == GRANULE and allocation.location.id == 0
        if (len(self.live) + 1) * GRANULE > self.total_bytes:
            return Result.CUDA_ERROR_OUT_OF_MEMORY, None
        handle, self._next = self._next, self._next + 1
        os.ftruncate(self._file, self._next * GRANULE)
        self.live.add(handle)
        return OK, handle

    def cuMemRelease(self, handle: int) -> tuple[Any, ...]:
        assert handle not in self.mapped.values(), "released while mapped"
        self.live.remove(handle)
        return (OK,)

    def cuMemMap(self, address: int, size: int, offset: int, handle: int, flags: int) -> tuple[Any, ...]:
        inside = any(base <= address and address + size <= base + total for base, total in self.reserved.items())
        if address in self.mapped or not inside or address % GRANULE or handle in self.mapped.values():
            return (Result.CUDA_ERROR_INVALID_VALUE,)
        assert handle in self.live and (size, offset) == (GRANULE, 0)
        self.mapped[address] = handle
        _libc.mmap(address, size, _PROT_NONE, _SHARED | _FIXED, self._file, handle * GRANULE)
        return (OK,)

    def cuMemSetAccess(self, address: int, size: int, access: list[Any], count: int) -> tuple[Any, ...]:
        granules = set(range(address, address + size, GRANULE))
        if not granules <= set(self.mapped):
            return (Result.CUDA_ERROR_INVALID_VALUE,)
        assert len(access) == count == 1 and access[0].flags == 3 and access[0].location.id == 0
        _libc.mprotect(address, size, _PROT_READ_WRITE)
        self.accessible |= granules
        return (OK,)

    def cuMemUnmap(self, address: int, size: int) -> tuple[Any, ...]:
        if address not in self.mapped or size != GRANULE:
            return (Result.CUDA_ERROR_INVALID_VALUE,)
        del self.mapped[address]
        self.accessible.discard(address)
        _libc.mmap(address, size, _PROT_NONE, _PRIVATE | _ANONYMOUS | _FIXED | _NORESERVE, -1, 0)
        return (OK,)


class FakeEvent:
    def __init__(self, cuda: "FakeCuda", name: int) -> None:
        self._cuda, self.name = cuda, name
        self.is_over = True  # as one that was never recorded

    def record(self, stream: "FakeStream") -> None:
        self._cuda.log.append(("record", self.name, stream.name))
        self.is_over = not self._cuda.is_busy

    def synchronize(self) -> None:
        self._cuda.log.append(("synchronize", self.name))
        self.is_over = True

    def query(self) -> bool:
        return self.is_over


class FakeStream:
    def __init__(self, cuda: "FakeCuda", name: str) -> None:
        self._cuda, self.name = cuda, name

    def wait_stream(self, other: "FakeStream") -> None:
        self._cuda.log.append(("wait_stream", self.name, other.name))

    def wait_event(self, event: FakeEvent) -> None:
        self._cuda.log.append(("wait_event", self.name, event.name))


class FakeCuda:
    """What is used of torch.cuda. Copies happen at once; while `is_busy`, an event recorded is over when waited for."""

    def __init__(self, log: list[Any] | None = None) -> None:
        self.log: list[Any] = [] if log is None else log
        self.is_busy = False
        self.compute = FakeStream(self, "compute")
        self._num_events = 0

    def Event(self, blocking: bool = False) -> FakeEvent:
        self._num_events += 1
        return FakeEvent(self, self._num_events)

    def Stream(self, device: object) -> FakeStream:
        return FakeStream(self, "copy")

    def current_stream(self, device: object) -> FakeStream:
        return self.compute

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        self.log.append(("copy", stream.name))
        yield
