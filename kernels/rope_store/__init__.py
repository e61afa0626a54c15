"""rope_store: what lies between a layer's product of queries, keys and values and its attention, in one launch.

Of each token's row [q heads | k heads | v heads]:

    q = rope(norm(q))                         returned
    key_cache[slot]   = rope(norm(k))         where slot = slot_mapping[t]; a negative one: nothing is written
    value_cache[slot] = v

rope's pairs are (i, i + rotated / 2) of a head's first `rotated` elements; the rest stays. Norms are RMS norms of every
head, with one weight for the queries' and one for the keys'; most families have none.

Running example, a token of KV slot 9 with one head each of 4, 4 and 1 elements, whose pair 0 turns by 90 degrees (cos
0, sin 1) and pair 1 by nothing: [1, 2, 3, 4 | 5, 6, 7, 8 | 9] gives the query [-3, 2, 1, 4], and at KV slot 9 the key
[-7, 6, 5, 8] and the value [9].
"""

from torch import Tensor

from kernels.compiled import takes
from kernels.lora.delta import Delta
from kernels.rms_norm import rms_norm
from kernels.rope import rope
from kernels.rope_store import reference
from kernels.rope_store.heads import HeadNorms, Heads
from kernels.store_kv import store_kv

__all__ = ["HeadNorms", "Heads", "rope_store"]


def rope_store(
    qkv: Tensor,
    heads: Heads,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    norms: HeadNorms | None = None,
    delta: Delta | None = None,
) -> Tensor:
    """See reference.py for shapes. On a host the ops that it is made of, one after another.

    delta: what adapters add to qkv, and is not added yet; for Triton's kernel.
    """
    if takes(qkv):
        from kernels.rope_store import kernel

        return kernel.rope_store(qkv, heads, cos, sin, key_cache, value_cache, slot_mapping, norms, delta)
    assert delta is None
    query, key, value = reference.turned(qkv, heads, cos, sin, norms, rms_norm, rope)
    store_kv(key, value, key_cache, value_cache, slot_mapping)
    return query
