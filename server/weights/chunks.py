"""Host memory in chunks of one size, for files of adapters (host_cache.py)."""

import torch
from torch import Tensor

from server.weights.arena import ArenaError

CHUNK_BYTES = 1 << 20  # a copy of this size to a GPU is near the full speed of the bus; half of it is lost an adapter
_PER_EXTENT = 16  # chunks that are allocated at once: page-locking memory takes long, whatever its size


class HostChunks:
    """As many as the budget has room for. Page-locked ones a GPU may read from while the host goes on."""

    def __init__(self, budget_bytes: int, is_pinned: bool, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.num_chunks, self.chunk_bytes, self._is_pinned = budget_bytes // chunk_bytes, chunk_bytes, is_pinned
        self._extents: dict[int, Tensor] = {}

    def chunk(self, index: int) -> Tensor:
        number, within = divmod(index, _PER_EXTENT)
        if number not in self._extents:
            self._extents[number] = self._allocate(min(_PER_EXTENT, self.num_chunks - number * _PER_EXTENT))
        return self._extents[number][within * self.chunk_bytes : (within + 1) * self.chunk_bytes]

    def _allocate(self, num_chunks: int) -> Tensor:
        size = num_chunks * self.chunk_bytes
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=self._is_pinned)
        except RuntimeError as error:
            kind = "page-locked memory" if self._is_pinned else "memory"
            raise ArenaError(f"cannot allocate {size:,} bytes of {kind}: {str(error).splitlines()[0]}") from None
