"""A batch of sequences as paged_attention's kernel reads it, made from the lists that its reference reads."""

from collections.abc import Sequence
from itertools import accumulate

import torch

from kernels.paged_attention import NUM_COUNTERS, DeviceBatch


def device_batch(
    query_lens: Sequence[int], kv_lens: Sequence[int], block_tables: Sequence[Sequence[int]], device: torch.device | str
) -> DeviceBatch:
    """The arguments are AttentionBatch's. Block tables are padded with block 0 to the longest."""
    width = max(map(len, block_tables), default=0)
    padded = [[*table, *[0] * (width - len(table))] for table in block_tables]

    def on_device(values: Sequence[object]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return DeviceBatch(
        query_starts=on_device([0, *accumulate(query_lens)]),
        kv_lens=on_device(kv_lens),
        block_tables=on_device(padded).view(len(padded), width),
        counters=torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device),
        max_query_len=max(query_lens, default=0),
    )
