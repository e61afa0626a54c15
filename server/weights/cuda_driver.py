"""The calls of CUDA's driver that virtual memory needs, with errors that say what was asked for.

The only file that knows `cuda.bindings` (the package cuda-bindings), and only when it is asked to load it.
"""

from typing import Any

from server.weights.arena import ArenaError, VirtualMemoryUnsupported


class CudaDriver:
    """Virtual memory on one device. Handles are the driver's own; addresses and sizes are ints, in bytes.

    `bindings` is the module cuda.bindings.driver. Its functions return (result, *values).
    """

    def __init__(self, bindings: Any, ordinal: int) -> None:
        self._d = d = bindings
        self._ordinal = ordinal
        self._call("cuInit", 0)
        (device,) = self._call("cuDeviceGet", ordinal)
        attribute = d.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
        if not self._call("cuDeviceGetAttribute", attribute, device)[0]:
            raise VirtualMemoryUnsupported(f"cuda:{ordinal} has no virtual memory management")
        (self._context,) = self._call("cuDevicePrimaryCtxRetain", device)  # the one that torch uses
        self._allocation = d.CUmemAllocationProp()
        self._allocation.type = d.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._allocation.location.type = d.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._allocation.location.id = ordinal
        self._access = d.CUmemAccessDesc()
        self._access.location = self._allocation.location
        self._access.flags = d.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE

    def enter(self) -> None:
        """Make this thread one of the device's. Cheap; before the others, on every thread."""
        self._call("cuCtxSetCurrent", self._context)

    def granularity(self) -> int:
        minimum = self._d.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        return int(self._call("cuMemGetAllocationGranularity", self._allocation, minimum)[0])

    def reserve(self, num_bytes: int) -> int:
        return int(self._call("cuMemAddressReserve", num_bytes, 0, 0, 0, asked=num_bytes)[0])

    def free_addresses(self, address: int, num_bytes: int) -> None:
        self._call("cuMemAddressFree", address, num_bytes, asked=num_bytes)

    def create(self, num_bytes: int) -> Any:
        return self._call("cuMemCreate", num_bytes, self._allocation, 0, asked=num_bytes)[0]

    def release(self, handle: Any) -> None:
        self._call("cuMemRelease", handle)

    def map(self, address: int, num_bytes: int, handle: Any) -> None:
        self._call("cuMemMap", address, num_bytes, 0, handle, 0, asked=num_bytes)

    def unmap(self, address: int, num_bytes: int) -> None:
        self._call("cuMemUnmap", address, num_bytes, asked=num_bytes)

    def allow_access(self, address: int, num_bytes: int) -> None:
        """To everything in a range that is mapped without a gap."""
        self._call("cuMemSetAccess", address, num_bytes, [self._access], 1, asked=num_bytes)

    def synchronize(self) -> None:
        self._call("cuCtxSynchronize")

    def _call(self, name: str, *arguments: Any, asked: int | None = None) -> list[Any]:
        try:
            function = getattr(self._d, name)
        except AttributeError:
            raise VirtualMemoryUnsupported(f"this version of cuda-bindings has no {name}") from None
        try:
            result, *values = function(*arguments)
        except RuntimeError as error:  # no driver, or one without this function; what CUDA refuses is a result
            raise VirtualMemoryUnsupported(f"{name} is missing from the driver: {error}") from None
        if result != self._d.CUresult.CUDA_SUCCESS:
            raise self._error(name, result, asked)
        return list(values)

    def _error(self, name: str, result: Any, asked: int | None) -> ArenaError:
        of = "" if asked is None else f" of {asked:,} bytes"
        text = f"{name}{of} on cuda:{self._ordinal} failed: {result.name}"
        if asked is not None:
            status, *sizes = self._d.cuMemGetInfo()
            if status == self._d.CUresult.CUDA_SUCCESS:
                text += f" ({int(sizes[0]):,} of {int(sizes[1]):,} bytes free)"
        unsupported = result in (self._d.CUresult.CUDA_ERROR_NOT_SUPPORTED, self._d.CUresult.CUDA_ERROR_NOT_PERMITTED)
        return VirtualMemoryUnsupported(text) if unsupported else ArenaError(text)


def load_driver(ordinal: int) -> CudaDriver:
    """Raises VirtualMemoryUnsupported where the package, the driver or the device cannot do it."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise VirtualMemoryUnsupported(f"the package cuda-bindings cannot be imported ({error})") from None
    return CudaDriver(driver, ordinal)
