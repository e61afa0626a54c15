"""The tables by which kernels find an adapter's A and B."""

import torch

from adapters_store.parts import LowRank, TensorRef
from kernels.lora import Field, LoraSite, SiteAdapters
from server.weights.host_arena import host_arenas
from server.weights.lora_slabs import LoraSlabs
from server.weights.page_pool import PagePool


def test_the_table_that_kernels_read_says_where_any_adapter_acts() -> None:
    arenas = host_arenas()
    slabs = LoraSlabs(2, PagePool(1 << 20, arenas.page_bytes), torch.float32, arenas)
    held = {"q": SiteAdapters(), "o": SiteAdapters()}
    for name, width in (("q", 8), ("o", 6)):
        slabs.bind(name, [(LoraSite((width,)), held[name], lambda weights: [(0, weights)])])
    slabs.make_table(torch.device("cpu"))
    parts = {
        slot: [LowRank("q", TensorRef("f", "a", (rank, 4), "F32"), TensorRef("f", "b", (8, rank), "F32"), 1.0)]
        for slot, rank in ((1, 3), (2, 5))
    }
    for slot in (1, 2):
        slabs.map(slot, parts[slot])
        slabs.install(slot, parts[slot])
    assert (slabs.rank(1), slabs.rank(2)) == (3, 5)
    for slot in (1, 2):
        assert held["q"].table is not None and held["o"].table is not None
        assert held["q"].table[0, 0, Field.A] == 1 and held["q"].table[slot].any() and not held["o"].table.any()
        slabs.unmap(slot)
    assert not held["q"].table.any() and slabs.rank(1) == slabs.rank(2) == 0
