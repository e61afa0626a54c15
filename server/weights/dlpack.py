"""A torch tensor over memory that torch did not allocate, of any dtype, on any device.

By DLPack, whose structures are laid out here (dlpack.h, version 0.8): the one public way that knows bfloat16.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

_DEVICE_TYPES = {"cpu": 1, "cuda": 2}  # kDLCPU, kDLCUDA
_SIGNED, _UNSIGNED, _FLOAT, _BFLOAT = 0, 1, 2, 4
_DTYPES = {
    torch.uint8: (_UNSIGNED, 8),
    torch.int32: (_SIGNED, 32),
    torch.int64: (_SIGNED, 64),
    torch.float16: (_FLOAT, 16),
    torch.float32: (_FLOAT, 32),
    torch.bfloat16: (_BFLOAT, 16),
}


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

# what torch still points to, by address: the structure, the arrays in it, and the owner of the memory
_alive: dict[int, tuple[Any, ...]] = {}


@_Deleter
def _delete(managed: Any) -> None:
    _alive.pop(ctypes.addressof(managed.contents), None)


def tensor_at(address: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, owner: object) -> Tensor:
    """A contiguous tensor of `shape` at `address`. Reads nothing; `owner` lives at least as long as its storage."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * max(1, shape[axis + 1])
    array = ctypes.c_int64 * len(shape)
    c_shape, c_strides = array(*shape), array(*strides)
    managed = _ManagedTensor()
    managed.tensor = _Tensor(
        address,
        _Device(_DEVICE_TYPES[device.type], device.index or 0),
        len(shape),
        _DataType(*_DTYPES[dtype], 1),
        ctypes.cast(c_shape, ctypes.POINTER(ctypes.c_int64)),
        ctypes.cast(c_strides, ctypes.POINTER(ctypes.c_int64)),
        0,
    )
    managed.deleter = _delete
    where = ctypes.addressof(managed)
    _alive[where] = (managed, c_shape, c_strides, owner)
    try:
        return torch.utils.dlpack.from_dlpack(_new_capsule(where, b"dltensor", None))
    except BaseException:
        _alive.pop(where, None)
        raise
