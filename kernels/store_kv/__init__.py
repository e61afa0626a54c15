"""store_kv: write the keys and values of a step's tokens to their KV slots in the paged cache."""

from torch import Tensor

from kernels.compiled import takes
from kernels.store_kv import reference

__all__ = ["store_kv", "store_latent"]


def store_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """key [T, Hkv, D] and value [T, Hkv, Dv] into the caches, in place; arguments as in reference.py."""
    if takes(key):
        from kernels.store_kv.kernel import store_kv as launch

        return launch(key, value, key_cache, value_cache, slot_mapping)
    return reference.store_kv(key, value, key_cache, value_cache, slot_mapping)


def store_latent(latent: Tensor, rope: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """latent [T, L] and rope [T, R] of MLA into cache [blocks, block_size, 1, L + R], in place."""
    if takes(latent):
        from kernels.store_kv.kernel import store_latent as launch

        return launch(latent, rope, cache, slot_mapping)
    return reference.store_latent(latent, rope, cache, slot_mapping)
