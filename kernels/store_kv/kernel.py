"""Triton form of store_kv: one launch for keys and values; a program copies some heads of one token.

Only the KV slots that slot_mapping names are written. Blocks need not be cleared before their first use, since
paged_attention's kernel loads nothing past a sequence's end. (Its reference does, and masks it.)
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from kernels.compiled.kernel import Configuration
from kernels.compiled.launch import launch

MAX_ELEMENTS = 4096  # of the keys that a program copies


@triton.jit
def _copy(source, target, token, kv_slot, first_head, stride, head_stride, block_stride, offset_stride,
          cache_head_stride, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_H: tl.constexpr, PADDED: tl.constexpr,
          BLOCK_SIZE: tl.constexpr):  # fmt: skip
    """Some heads of one token, [BLOCK_H, PADDED]."""
    heads = first_head + tl.arange(0, BLOCK_H)[:, None]
    dims = tl.arange(0, PADDED)[None, :]
    mask = (heads < HEADS) & (dims < DIM)
    loaded = tl.load(source + token * stride + heads * head_stride + dims, mask=mask, other=0.0)
    row = target + (kv_slot // BLOCK_SIZE) * block_stride + (kv_slot % BLOCK_SIZE) * offset_stride
    tl.store(row + heads * cache_head_stride + dims, loaded.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _store(
    key, value, key_cache, value_cache, slot_mapping,  # [T, Hkv, ..]; [blocks, BLOCK_SIZE, Hkv, ..]; [T]
    key_stride, key_head_stride, value_stride, value_head_stride,
    key_block_stride, key_offset_stride, key_cache_head_stride,
    value_block_stride, value_offset_stride, value_cache_head_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr, PADDED: tl.constexpr, VALUE_PADDED: tl.constexpr,
):  # fmt: skip
    """Programs: (token, some heads). A token with a negative KV slot only pads the batch."""
    token = tl.program_id(0).to(tl.int64)
    first_head = tl.program_id(1).to(tl.int64) * BLOCK_H
    kv_slot = tl.load(slot_mapping + token).to(tl.int64)
    if kv_slot < 0:
        return
    _copy(key, key_cache, token, kv_slot, first_head, key_stride, key_head_stride, key_block_stride, key_offset_stride,
          key_cache_head_stride, HEADS, DIM, BLOCK_H, PADDED, BLOCK_SIZE)  # fmt: skip
    _copy(value, value_cache, token, kv_slot, first_head, value_stride, value_head_stride, value_block_stride,
          value_offset_stride, value_cache_head_stride, HEADS, VALUE_DIM, BLOCK_H, VALUE_PADDED,
          BLOCK_SIZE)  # fmt: skip


def _constants(heads: int, dim: int, value_dim: int, block_size: int) -> dict[str, int]:
    padded, value_padded = triton.next_power_of_2(dim), triton.next_power_of_2(value_dim)
    block_h = min(triton.next_power_of_2(heads), max(1, MAX_ELEMENTS // padded))
    return {"HEADS": heads, "DIM": dim, "VALUE_DIM": value_dim, "BLOCK_SIZE": block_size, "BLOCK_H": block_h,
            "PADDED": padded, "VALUE_PADDED": value_padded}  # fmt: skip


def _write(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    if not len(key):
        return
    assert key_cache.stride(-1) == 1 and value_cache.stride(-1) == 1
    key = key if key.stride(-1) == 1 else key.contiguous()
    value = value if value.stride(-1) == 1 else value.contiguous()
    heads, dim = key.shape[1:]
    constants = _constants(heads, dim, value.shape[-1], key_cache.shape[1])
    _store[(len(key), triton.cdiv(heads, constants["BLOCK_H"]))](
        key, value, key_cache, value_cache, slot_mapping, *key.stride()[:2], *value.stride()[:2],
        *key_cache.stride()[:3], *value_cache.stride()[:3], **constants,
    )  # fmt: skip


@launch("store_kv", mutates_args=("key_cache", "value_cache"))
def _store_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    _write(key, value, key_cache, value_cache, slot_mapping)


@_store_kv.register_fake
def _(*_: object) -> None:
    return None


@launch("store_latent", mutates_args=("cache",))
def _store_latent(latent: Tensor, rope: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    split = latent.shape[-1]
    _write(latent[:, None], rope[:, None], cache[..., :split], cache[..., split:], slot_mapping)


@_store_latent.register_fake
def _(*_: object) -> None:
    return None


def store_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """As the reference. Rows may be strided views, contiguous in the last dimension; so may the caches."""
    _store_kv(key, value, key_cache, value_cache, slot_mapping)


def store_latent(latent: Tensor, rope: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """As the reference; both parts in one launch."""
    _store_latent(latent, rope, cache, slot_mapping)


def configurations() -> Iterator[Configuration]:
    """Grouped-query attention's and MLA's caches."""
    shapes = [("d128", 8, 128, 128), ("d80", 32, 80, 80), ("d192/128", 16, 192, 128), ("latent", 1, 512, 64)]
    for element in ("bf16", "fp32"):
        for name, heads, dim, value_dim in shapes:
            constants = _constants(heads, dim, value_dim, 16)
            types = {name: "i32:16" for name in _store.arg_names if name not in constants}
            types |= {name: f"*{element}:16" for name in ("key", "value", "key_cache", "value_cache")}
            types["slot_mapping"] = "*i32:16"
            yield Configuration(f"{name} {element}", _store, types, constants)
