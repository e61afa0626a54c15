"""paged_attention: attention of a mixed batch of prefill chunks and decodes over the paged KV cache.

Each of the T tokens of a step attends to the tokens of its own sequence up to itself, for each query head:

    out[t] = softmax(scale * query[t] @ keys.T) @ values

Keys and values lie in a cache of blocks, a few tokens each. A sequence's block table lists its blocks in the order of
its tokens. `kv_lens` counts the tokens of a sequence that are in the cache after this step, the new ones included; they
are its last.

Running example, blocks of 4 tokens: sequence 0 decodes its 6th token, sequence 1 prefills its tokens 3, 4 and 5.

    query_lens    [1, 3]             rows of the query: 0 | 1 2 3
    kv_lens       [6, 5]
    block_tables  [[9, 2], [4, 7]]

Row 0 sees the four keys of block 9 and the first two of block 2. Row 1, the third token of its sequence, sees the first
three keys of block 4; row 3 sees all of block 4 and the first key of block 7.
"""

from torch import Tensor

from kernels.compiled import takes
from kernels.host import takes as host_takes
from kernels.paged_attention import host, reference
from kernels.paged_attention.batch import NUM_COUNTERS, AttentionBatch, DeviceBatch

__all__ = ["NUM_COUNTERS", "AttentionBatch", "DeviceBatch", "paged_attention"]


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: AttentionBatch | DeviceBatch,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Causal attention of each token over its own sequence, [T, Hq, Dv]; the arguments are explained in reference.py.

    batch: a DeviceBatch where a kernel computes, an AttentionBatch where the reference does.
    """
    if takes(query):
        from kernels.paged_attention.kernel import paged_attention as launch

        assert isinstance(batch, DeviceBatch), "the kernel reads lengths and block tables from the device"
        return launch(query, key_cache, value_cache, batch, scale, window, softcap, sinks, chunk)
    if isinstance(batch, DeviceBatch):
        assert host_takes(query), f"no kernel takes {query.dtype} on {query.device}"
        return host.paged_attention(query, key_cache, value_cache, batch, scale, window, softcap, sinks, chunk)
    assert isinstance(batch, AttentionBatch), "the reference reads lengths and block tables from the host"
    return reference.paged_attention(query, key_cache, value_cache, batch, scale, window, softcap, sinks, chunk)
