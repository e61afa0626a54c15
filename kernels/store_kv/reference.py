"""Reference and CPU path of store_kv."""

from torch import Tensor


def store_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write in place.

    key [T, Hkv, D], value [T, Hkv, Dv]: one row a token of the step.
    key_cache [blocks, block_size, Hkv, D], value_cache [blocks, block_size, Hkv, Dv], contiguous.
    slot_mapping [T] int64: block * block_size + offset of each token; no slot twice.
    """
    key_cache.view(-1, *key_cache.shape[2:]).index_copy_(0, slot_mapping, key)
    value_cache.view(-1, *value_cache.shape[2:]).index_copy_(0, slot_mapping, value)
