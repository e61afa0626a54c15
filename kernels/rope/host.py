"""Calls rope's host kernel (host.cpp)."""

import ctypes
from ctypes import byref, c_int64, c_void_p
from enum import IntEnum

import torch
from torch import Tensor

from kernels.host import library


class _Pairing(IntEnum):
    """Pairing in host.cpp: which elements are pairs, and where their results go."""

    HALVES = 0
    INTERLEAVED = 1  # neighbours, whose results go to halves
    ADJACENT = 2  # neighbours, and they stay neighbours


class _Rope(ctypes.Structure):
    """Rope in host.cpp, field by field."""

    _fields_ = [
        *((name, c_void_p) for name in ("query", "key", "cosines", "sines", "query_out", "key_out")),
        *((name, c_int64) for name in (
            "query_token", "query_head", "key_token", "key_head", "angle_token", "angle_step", "tokens", "query_heads",
            "key_heads", "depth", "pairing",
        )),
    ]  # fmt: skip


def rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """As the reference."""
    assert cos.stride() == sin.stride() and cos.stride(-1) == 1
    return _launch(query, key, cos, sin, cos.stride(1), 1, _Pairing.INTERLEAVED if interleaved else _Pairing.HALVES)


def rope_complex(query: Tensor, key: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference."""
    frequencies = frequencies.contiguous()
    cosines, sines = frequencies[..., 0], frequencies[..., 1]
    return _launch(query, key, cosines, sines, cosines.stride(1), 2, _Pairing.ADJACENT)


def _launch(
    query: Tensor, key: Tensor, cosines: Tensor, sines: Tensor, angle_token: int, angle_step: int, pairing: _Pairing
) -> tuple[Tensor, Tensor]:
    assert cosines.shape[:2] == (1, query.shape[2]) and cosines.shape[2] >= query.shape[3] // 2
    assert key.dtype == query.dtype and cosines.dtype == sines.dtype and cosines.dtype in (torch.float32, query.dtype)
    assert key.shape[2:] == query.shape[2:]
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    outs = [torch.empty(1, x.shape[2], x.shape[1], x.shape[3], dtype=x.dtype).transpose(1, 2) for x in (query, key)]
    it = _Rope(
        query.data_ptr(), key.data_ptr(), cosines.data_ptr(), sines.data_ptr(), *(x.data_ptr() for x in outs),
        query.stride(2), query.stride(1), key.stride(2), key.stride(1), angle_token, angle_step, query.shape[2],
        query.shape[1], key.shape[1], query.shape[3], pairing,
    )  # fmt: skip
    library().heddle_rope(byref(it), query.dtype is torch.bfloat16, cosines.dtype is torch.bfloat16)
    return outs[0], outs[1]
