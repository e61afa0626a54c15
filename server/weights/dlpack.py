"""Memory that torch did not allocate, as a torch tensor of bytes, on any device.

By DLPack, whose structures are laid out here (dlpack.h, version 0.8). Other dtypes and shapes are views of the bytes.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

_DEVICE_TYPES = {"cpu": 1, "cuda": 2}  # kDLCPU, kDLCUDA
_UNSIGNED, _BITS = 1, 8  # kDLUInt


class _Device(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("id", ctypes.c_int32)]


class _DataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _ManagedTensor(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_ManagedTensor))
_ManagedTensor._fields_ = [("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter)]

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]

# what torch still points to, by address: the structure, its shape, and the owner of the memory
_alive: dict[int, tuple[Any, ...]] = {}


@_Deleter  # type: ignore[untyped-decorator]
def _delete(managed: Any) -> None:
    _alive.pop(ctypes.addressof(managed.contents), None)


def bytes_at(address: int, num_bytes: int, device: torch.device, owner: object) -> Tensor:
    """[num_bytes] uint8 at `address`. Reads nothing; `owner` lives at least as long as the tensor's storage."""
    shape = (ctypes.c_int64 * 1)(num_bytes)
    managed = _ManagedTensor()
    managed.tensor = _Tensor(
        address,
        _Device(_DEVICE_TYPES[device.type], device.index or 0),
        1,
        _DataType(_UNSIGNED, _BITS, 1),
        ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64)),
        None,  # contiguous
        0,
    )
    managed.deleter = _delete
    where = ctypes.addressof(managed)
    _alive[where] = (managed, shape, owner)
    try:
        return torch.utils.dlpack.from_dlpack(_new_capsule(where, b"dltensor", None))
    except BaseException:
        _alive.pop(where, None)
        raise
