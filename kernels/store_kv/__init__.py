"""store_kv: write the keys and values of a step's tokens to their KV slots in the paged cache.

The cache is blocks of a few tokens each. A KV slot counts through all of them: slot = block * block_size + offset.

    key_cache[slot // block_size, slot % block_size] = key[t]       where slot = slot_mapping[t]; values likewise

Running example, continued from paged_attention, blocks of 4 tokens: sequence 0 writes its 6th token, sequence 1 its
tokens 3, 4 and 5. Their block tables are [9, 2] and [4, 7].

    block         2  4  4  7
    offset        1  2  3  0
    slot_mapping  9 18 19 28
"""

from torch import Tensor

from kernels.compiled import takes
from kernels.host import takes as host_takes
from kernels.store_kv import host, reference

__all__ = ["store_kv", "store_latent"]


def store_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write key [T, Hkv, D] and value [T, Hkv, Dv] into the caches, in place. See reference.py for shapes."""
    if takes(key):
        from kernels.store_kv.kernel import store_kv as launch

        return launch(key, value, key_cache, value_cache, slot_mapping)
    if host_takes(key):
        return host.store_kv(key, value, key_cache, value_cache, slot_mapping)
    return reference.store_kv(key, value, key_cache, value_cache, slot_mapping)


def store_latent(latent: Tensor, rope: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """Write MLA's latent [T, L] and rope [T, R] into the cache, in place. See reference.py for shapes."""
    if takes(latent):
        from kernels.store_kv.kernel import store_latent as launch

        return launch(latent, rope, cache, slot_mapping)
    if host_takes(latent):
        return host.store_latent(latent, rope, cache, slot_mapping)
    return reference.store_latent(latent, rope, cache, slot_mapping)
