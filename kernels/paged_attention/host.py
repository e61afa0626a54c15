"""Calls paged_attention's host kernel (host.cpp)."""

import ctypes
from ctypes import byref, c_float, c_int64, c_void_p

import torch
from torch import Tensor

from kernels.host import library
from kernels.paged_attention.batch import DeviceBatch


class _Attention(ctypes.Structure):
    """Attention in host.cpp, field by field."""

    _fields_ = [
        *((name, c_void_p) for name in ("query", "out", "keys", "values")),
        *((name, c_int64) for name in (
            "query_token", "query_head", "key_block", "key_token", "key_head", "value_block", "value_token",
            "value_head",
        )),
        *((name, c_void_p) for name in ("query_starts", "kv_lens", "tables")),
        *((name, c_int64) for name in (
            "table_step", "sequences", "block_size", "heads", "kv_heads", "depth", "width", "window", "chunk",
        )),
        ("sinks", c_void_p),
        ("scale", c_float),
        ("softcap", c_float),
    ]  # fmt: skip


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: DeviceBatch,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """As the reference. Heads of query and caches are contiguous in their last dimension; sums are in float32.

    Of a sequence's last block only what belongs to it is read.
    """
    if query.stride(-1) != 1:
        query = query.contiguous()
    out = query.new_empty(*query.shape[:2], value_cache.shape[-1])
    assert key_cache.dtype == value_cache.dtype == query.dtype
    assert key_cache.stride(3) == value_cache.stride(3) == 1
    if sinks is not None:
        sinks = sinks.float().contiguous()
    it = _Attention(
        query.data_ptr(), out.data_ptr(), key_cache.data_ptr(), value_cache.data_ptr(),
        query.stride(0), query.stride(1), *key_cache.stride()[:3], *value_cache.stride()[:3],
        batch.query_starts.data_ptr(), batch.kv_lens.data_ptr(), batch.block_tables.data_ptr(),
        batch.block_tables.stride(0), batch.kv_lens.shape[0], key_cache.shape[1], query.shape[1], key_cache.shape[2],
        query.shape[2], value_cache.shape[3], window or 0, chunk or 0,
        None if sinks is None else sinks.data_ptr(), scale, softcap or 0.0,
    )  # fmt: skip
    library().heddle_paged_attention(byref(it), query.dtype is torch.bfloat16)
    return out
