"""The device's form of what adapters have at one site of LoRA, as the weight manager keeps it."""

from itertools import accumulate

import torch

from kernels.lora import LoraSite, SiteAdapters, table_rows
from tests.support.kernel_device import DEVICE


def attach(site: LoraSite, adapters: SiteAdapters, count: int) -> None:
    """Make the table of slots 0..count-1, and the offsets, from `by_slot`."""
    adapters.table = torch.tensor([table_rows(site, adapters, slot) for slot in range(count)], device=DEVICE)
    adapters.offsets = torch.tensor(list(accumulate(site.widths, initial=0)), dtype=torch.int32, device=DEVICE)
