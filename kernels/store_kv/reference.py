"""Reference of store_kv."""

from torch import Tensor


def store_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write the keys and values of a step to their KV slots, in place.

    key [T, Hkv, D], value [T, Hkv, Dv]: one row for each token of the step.
    key_cache [blocks, block_size, Hkv, D], value_cache [blocks, block_size, Hkv, Dv]; both may be strided views.
    slot_mapping [T] integer: each token's KV slot, block * block_size + offset; none twice. Tokens with a negative one
    only pad the batch and are not written.
    """
    if (padding := slot_mapping < 0).any():
        key, value, slot_mapping = key[~padding], value[~padding], slot_mapping[~padding]
    kv_slots = slot_mapping.long()
    _put(key_cache, kv_slots, key)
    _put(value_cache, kv_slots, value)


def _put(cache: Tensor, kv_slots: Tensor, rows: Tensor) -> None:
    if cache.stride(0) == cache.shape[1] * cache.stride(1):  # the blocks lie one behind another
        cache.view(-1, *cache.shape[2:]).index_copy_(0, kv_slots, rows)
    else:
        cache[kv_slots // cache.shape[1], kv_slots % cache.shape[1]] = rows


def store_latent(latent: Tensor, rope: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """Write what MLA caches of each token, in place: its latent part and its rotated key, side by side.

    latent [T, L], rope [T, R], cache [blocks, block_size, 1, L + R]; slot_mapping as in store_kv.
    """
    split = latent.shape[-1]
    store_kv(latent[:, None], rope[:, None], cache[..., :split], cache[..., split:], slot_mapping)
