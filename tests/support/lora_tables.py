"""What kernels read of LoRA: what adapters have at a site, as the weight manager keeps it, and whose rows are whose."""

from collections.abc import Sequence
from itertools import accumulate, groupby

import torch

from kernels.adapter_rows import AdapterTiles, Segment, cut
from kernels.lora import LoraSite, SiteAdapters, table_rows
from tests.support.kernel_device import DEVICE


def attach(site: LoraSite, adapters: SiteAdapters, count: int, device: torch.device | str = DEVICE) -> None:
    """Make the table of slots 0..count-1, and the offsets, from `by_slot`."""
    adapters.table = torch.tensor([table_rows(site, adapters, slot) for slot in range(count)], device=device)
    adapters.offsets = torch.tensor(list(accumulate(site.widths, initial=0)), dtype=torch.int32, device=device)


def tiles_of(slots: Sequence[int], tile_rows: int) -> AdapterTiles:
    """The rows of a step on the CPU whose tokens have these adapters, in order of slot: as spans and as tiles."""
    spans, start = [], 0
    for slot, run in groupby(slots):
        end = start + len(list(run))
        if slot:
            spans.append(Segment(start, end, slot))
        start = end
    tiles = torch.tensor(cut(spans, tile_rows), dtype=torch.int32).view(-1, 3)
    return AdapterTiles(spans, tiles, torch.tensor([len(tiles)], dtype=torch.int32), tile_rows)
