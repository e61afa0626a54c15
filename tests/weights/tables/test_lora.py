"""The table by which kernels find an adapter's A and B."""

import torch

from adapters_store.parts import LowRank, TensorRef
from kernels.adapter_rows import ShapeKey
from kernels.lora import Field, LoraSite
from server.weights.host_arena import host_arenas
from server.weights.page_pool import PagePool
from server.weights.tables.lora import LoraTable


def test_the_table_that_kernels_read_says_where_any_adapter_acts() -> None:
    arenas = host_arenas()
    table = LoraTable(2, PagePool(1 << 20, arenas.page_bytes), arenas)
    sites = {name: LoraSite((width,)) for name, width in (("q", 8), ("o", 6))}
    held = {name: table.open(site) for name, site in sites.items()}
    for name, site in sites.items():
        table.bind(name, [(site, lambda weights: [(0, weights)])], torch.float32)
    table.show_kernels(torch.device("cpu"))
    parts = {
        slot: [LowRank("q", TensorRef("f", "a", (rank, 4), "F32"), TensorRef("f", "b", (8, rank), "F32"), 1.0)]
        for slot, rank in ((1, 3), (2, 5))
    }
    for slot in (1, 2):
        assert not table.has(slot)
        table.map(slot, parts[slot])
        assert table.has(slot) and slot not in held["q"].by_slot  # kernels see nothing of it yet
        table.install(slot)
        table.check()
    assert (table.shape_key(1), table.shape_key(2)) == (ShapeKey(rank=3), ShapeKey(rank=5))
    for slot in (1, 2):
        assert held["q"].table is not None and held["o"].table is not None
        assert held["q"].table[0, 0, Field.A] == 1 and held["q"].table[slot].any() and not held["o"].table.any()
        table.unmap(slot)
    assert not held["q"].table.any() and table.shape_key(1) == table.shape_key(2) == ShapeKey()
    assert table.num_mapped_pages == 0
