"""Calls store_kv's host kernel (host.cpp)."""

from ctypes import c_int64, c_void_p

from torch import Tensor

from kernels.host import library


def store_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """As the reference."""
    kv_slots = slot_mapping.long().contiguous()
    _store(key, key_cache, kv_slots)
    _store(value, value_cache, kv_slots)


def store_latent(latent: Tensor, rope: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """As the reference."""
    split = latent.shape[-1]
    store_kv(latent[:, None], rope[:, None], cache[..., :split], cache[..., split:], slot_mapping)


def _store(rows: Tensor, cache: Tensor, kv_slots: Tensor) -> None:
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    assert rows.dtype == cache.dtype and cache.stride(3) == 1
    size = rows.itemsize
    steps = (cache.stride(0) * size, cache.stride(1) * size, cache.stride(2) * size)
    tokens, heads, width = rows.shape
    assert kv_slots.shape == (tokens,) and cache.shape[2:] == (heads, width)
    library().heddle_store(
        c_void_p(rows.data_ptr()), c_int64(rows.stride(0) * size), c_int64(rows.stride(1) * size),
        c_void_p(cache.data_ptr()), *map(c_int64, steps), c_void_p(kv_slots.data_ptr()), c_int64(tokens),
        c_int64(heads), c_int64(width * size), c_int64(cache.shape[1]),
    )  # fmt: skip
