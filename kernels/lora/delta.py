"""What adapters add to a product, on its way to whoever reads the product next."""

from typing import NamedTuple

from torch import Tensor

from kernels.adapter_rows import AdapterTiles


class Delta(NamedTuple):
    """Shrinks that are done, and expands that are not: the consumer of y [T, sum of widths] adds them as it reads it.

    z [splits, slices, T, max_rank] float32: the shrinks of parts of the depth, to be summed in this order. Of rows and
    ranks that no adapter has there it holds anything.
    table, offsets: as in SiteAdapters. cover: tiles over all rows, the base's too. bias: as in lora.
    """

    z: Tensor
    table: Tensor
    offsets: Tensor
    cover: AdapterTiles
    bias: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """As ops of torch's library take them: z, table, offsets, bias, tiles and how many these are."""
        assert self.cover.tiles is not None and self.cover.num_tiles is not None
        return self.z, self.table, self.offsets, self.bias, self.cover.tiles, self.cover.num_tiles
