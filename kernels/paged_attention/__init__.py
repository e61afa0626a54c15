"""paged_attention: attention of a mixed batch of prefill chunks and decodes over the paged KV cache."""

from torch import Tensor

from kernels.compiled import takes
from kernels.paged_attention import reference
from kernels.paged_attention.batch import NUM_COUNTERS, AttentionBatch, DeviceBatch, splits_decodes

__all__ = ["NUM_COUNTERS", "AttentionBatch", "DeviceBatch", "paged_attention", "splits_decodes"]


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
    """Causal attention of each token over its own sequence, [T, Hq, Dv]; arguments as in reference.py.

    A DeviceBatch (of a captured step) is for the kernel only.
    """
    if takes(query):
        from kernels.paged_attention.kernel import paged_attention as launch

        on_device = batch.device_form(query.device) if isinstance(batch, AttentionBatch) else batch
        return launch(query, key_cache, value_cache, on_device, scale, window, softcap, sinks, chunk)
    assert isinstance(batch, AttentionBatch), "the reference needs lengths and block tables on the host"
    return reference.paged_attention(query, key_cache, value_cache, batch, scale, window, softcap, sinks, chunk)
