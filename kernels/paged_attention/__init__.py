"""paged_attention: attention of a mixed batch of prefill chunks and decodes over the paged KV cache."""

from kernels.paged_attention.batch import AttentionBatch
from kernels.paged_attention.reference import paged_attention

__all__ = ["AttentionBatch", "paged_attention"]
