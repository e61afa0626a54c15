"""What the table of low-rank parts keeps of an adapter, and how kernels find it."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from adapters_store.parts import Assembled, LowRank, Piece, TensorRef
from kernels.adapter_rows import ShapeKey
from kernels.lora import Field, LoraSite, LoraWeights
from server.weights.host_arena import host_arenas
from server.weights.page_pool import own_pool
from server.weights.runs import Run, in_runs
from server.weights.tables.gains import GainError, to_gains
from server.weights.tables.lora import LoraTable
from server.weights.tables.table import Prepared

EXPERTS, OUT, IN, RANK = 3, 6, 4, 2


def ref(key: str, *shape: int) -> TensorRef:
    return TensorRef("f", key, shape, "F32")


def make_table(slots: int = 2) -> LoraTable:
    arenas = host_arenas()
    return LoraTable(slots, own_pool(1 << 20, arenas.page_bytes), arenas)


def bind(table: LoraTable, module: str, site: LoraSite, dtype: torch.dtype = torch.float32,
         rows: Callable[[], Tensor] | None = None) -> None:  # fmt: skip
    table.open(site)
    table.bind(module, [(site, lambda weights: [(0, weights)])], dtype, rows)


def mapped(table: LoraTable, slot: int, parts: list[LowRank]) -> Prepared:
    table.map(slot, table.layout(parts))
    return table.prepare(slot)


def test_the_table_that_kernels_read_says_where_any_adapter_acts() -> None:
    table = make_table()
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
        mapped(table, slot, parts[slot])
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


def test_magnitudes_become_gains_when_all_is_copied() -> None:
    """By the base's rows as they are then, and not on the step loop: whoever fills the places does it."""
    table, site, base = make_table(), LoraSite((OUT,)), torch.randn(OUT, IN)
    bind(table, "q", site, rows=lambda: base)
    part = LowRank("q", ref("a", RANK, IN), ref("b", OUT, RANK), 0.5, ref("m", OUT))
    prepared = mapped(table, 1, [part])
    places = {tensor.key: place for tensor, place in prepared.places}
    for place in places.values():
        place.copy_(torch.rand(place.shape) + 0.5)
    a, b, magnitude = (places[key].clone() for key in "abm")
    for derive in prepared.derive:
        derive()
    table.install(1)
    held = table.sites[site].by_slot[1][0]
    assert held is not None and held.gain is not None
    norms = (base + 0.5 * b @ a).norm(dim=1)
    torch.testing.assert_close(held.gain, magnitude / norms)
    # with it a product of the base has the rows' norms that the adapter wants
    torch.testing.assert_close((held.gain[:, None] * (base + 0.5 * b @ a)).norm(dim=1), magnitude)


def test_gains_are_float32_and_those_of_a_zero_row_are_refused() -> None:
    weights = LoraWeights(torch.zeros(1, IN, dtype=torch.bfloat16), torch.zeros(5000, 1, dtype=torch.bfloat16), 1.0,
                          torch.ones(5000))  # fmt: skip
    base = torch.full((5000, IN), 2.0, dtype=torch.bfloat16)
    to_gains(weights, base, "q")
    assert weights.gain is not None
    torch.testing.assert_close(weights.gain, torch.full((5000,), 1 / (2 * IN**0.5)))
    base[4999] = 0
    with pytest.raises(GainError, match="row 4999 of q has the norm 0 with the adapter"):
        to_gains(weights, base, "q")


def test_what_pieces_leave_open_is_cleared() -> None:
    table = make_table()
    bind(table, "experts.up_proj", LoraSite((OUT,), experts=EXPERTS))
    piece = Piece(ref("a0", 1, RANK, IN), (2, 0, 0))
    whole = Assembled((EXPERTS, RANK, IN), (piece,))
    covered = Assembled(
        (EXPERTS, OUT, RANK), tuple(Piece(ref(f"b{e}", 1, OUT, RANK), (e, 0, 0)) for e in range(EXPERTS))
    )
    prepared = mapped(table, 1, [LowRank("experts.up_proj", whole, covered, 1.0)])
    places = list(prepared.places)
    assert [tensor.key for tensor, _ in places] == ["a0", "b0", "b1", "b2"]
    held = table._held[1].weights[0]
    for tensor in (held.a, held.b):
        tensor.fill_(torch.nan)
    for tensor in prepared.cleared:
        tensor.zero_()
    for _, place in places:
        place.fill_(1.0)
    assert held.a.sum(dim=(1, 2)).tolist() == [0, 0, RANK * IN] and held.b.sum() == held.b.numel()
    assert table.shape_key(1) == ShapeKey(expert_rank=RANK)


def test_a_type_for_each_linear() -> None:
    """A router's logits are float32 whatever the base is, and so are the weights that change them."""
    table = make_table()
    bind(table, "q", LoraSite((OUT,)), torch.bfloat16)
    bind(table, "gate", LoraSite((EXPERTS,)), torch.float32)
    parts = [LowRank("q", ref("a", RANK, IN), ref("b", OUT, RANK), 1.0),
             LowRank("gate", ref("c", 1, IN), ref("d", EXPERTS, 1), 1.0)]  # fmt: skip
    places = dict((tensor.key, place.dtype) for tensor, place in mapped(table, 1, parts).places)
    assert places == {"a": torch.bfloat16, "b": torch.bfloat16, "c": torch.float32, "d": torch.float32}


def test_rows_for_kernels_say_how_far_it_is_from_expert_to_expert() -> None:
    table, site = make_table(), LoraSite((OUT,), experts=EXPERTS)
    bind(table, "experts.down_proj", site)
    table.show_kernels(torch.device("cpu"))
    part = LowRank("experts.down_proj", ref("a", EXPERTS, RANK, IN), ref("b", EXPERTS, OUT, RANK), 1.0)
    mapped(table, 2, [part])
    table.install(2)
    shown = table.sites[site].table
    assert shown is not None
    row = shown[2, 0].tolist()
    assert (row[Field.RANK], row[Field.A_STRIDE], row[Field.B_STRIDE]) == (RANK, RANK * IN, OUT * RANK)


def test_a_piece_may_have_been_trained_at_another_scale() -> None:
    table = make_table()
    bind(table, "experts.up_proj", LoraSite((OUT,), experts=EXPERTS))
    a = Assembled((EXPERTS, RANK, IN), (Piece(ref("a0", 1, RANK, IN), (0, 0, 0)),))
    pieces = (Piece(ref("b0", 1, OUT, RANK), (0, 0, 0)), Piece(ref("b2", 1, OUT, RANK), (2, 0, 0), factor=0.5))
    prepared = mapped(table, 1, [LowRank("experts.up_proj", a, Assembled((EXPERTS, OUT, RANK), pieces), 1.0)])
    places = {tensor.key: place.fill_(3.0) for tensor, place in prepared.places}
    for derive in prepared.derive:
        derive()
    assert {key: set(place.flatten().tolist()) for key, place in places.items()} == {"a0": {3}, "b0": {3}, "b2": {1.5}}


def test_dora_is_refused_where_the_base_has_no_rows_to_derive_gains_from() -> None:
    table = make_table()
    bind(table, "experts.up_proj", LoraSite((OUT,), experts=EXPERTS))
    a, b = ref("a", EXPERTS, RANK, IN), ref("b", EXPERTS, OUT, RANK)
    assert table.layout([LowRank("experts.up_proj", a, b, 1.0)]).refusal is None
    told = table.layout([LowRank("experts.up_proj", a, b, 1.0, ref("m", EXPERTS, OUT))]).refusal
    assert told is not None and told.startswith("DoRA on experts.up_proj is not served; merge")


class Steps:
    """A table over several sites, two of whose linears share one, under random orders of what residency does."""

    def __init__(self) -> None:
        self.table = make_table(slots=3)
        shared, alone, experts = LoraSite((OUT, 2)), LoraSite((OUT,)), LoraSite((OUT,), experts=EXPERTS)
        for site in (shared, alone, experts):
            self.table.open(site)
        for index, module in enumerate(("q", "k")):
            self.table.bind(module, [(shared, lambda weights, index=index: [(index, weights)])], torch.float32)
        self.table.bind("o", [(alone, lambda weights: [(0, weights)])], torch.bfloat16)
        self.table.bind("experts", [(experts, lambda weights: [(0, weights)])], torch.float32)
        self.table.show_kernels(torch.device("cpu"))

    def parts(self, modules: list[str], rank: int) -> list[LowRank]:
        out = {"q": OUT, "k": 2, "o": OUT}
        return [
            LowRank(it, ref(f"{it}.a", rank, IN), ref(f"{it}.b", out[it], rank), 1.0) if it in out else
            LowRank(it, ref("e.a", EXPERTS, rank, IN), ref("e.b", EXPERTS, OUT, rank), 1.0)
            for it in modules
        ]  # fmt: skip


def test_random_orders_of_mapping_preparing_installing_and_unmapping_leave_nothing_behind() -> None:
    """check() recomputes what kernels read; a transfer may fail before or after it was prepared."""
    rng, it = random.Random(4), Steps()
    table, state, layouts = it.table, dict.fromkeys((1, 2, 3), "absent"), {}
    for _ in range(600):
        slot = rng.choice((1, 2, 3))
        match state[slot], rng.random() < 0.3:
            case "absent", _:
                modules = rng.sample(["q", "k", "o", "experts"], rng.randrange(1, 5))
                layouts[slot] = table.layout(it.parts(modules, rng.choice([1, 3, 16])))
                pages, before = table.pages_for(layouts[slot]), table.num_mapped_pages
                table.map(slot, layouts[slot])
                assert table.num_mapped_pages - before == pages > 0
                state[slot] = "mapped"
            case "mapped", False:
                table.prepare(slot)
                state[slot] = "prepared"
            case "prepared", False:
                table.install(slot)
                state[slot] = "installed"
            case _:
                table.unmap(slot)
                state[slot] = "absent"
        table.check()
        assert all(table.has(each) == (its != "absent") for each, its in state.items())
        assert all(table.shape_key(each) == layouts[each].shape for each, its in state.items() if its != "absent")
        seen = {each for held in table.sites.values() for each in held.by_slot}
        assert seen == {each for each, its in state.items() if its == "installed"}
    for slot, its in state.items():
        if its != "absent":
            table.unmap(slot)
    assert table._table is not None and not table._table.any() and table.num_mapped_pages == 0


def test_what_lies_together_in_files_lies_together_in_the_slab_and_what_does_not_is_cleared_between() -> None:
    """Parts in any order; of two types. Nothing is checked that nothing was copied to."""
    table = make_table()
    for module, dtype in (("q", torch.bfloat16), ("k", torch.float32), ("v", torch.bfloat16)):
        bind(table, module, LoraSite((32,)), dtype)
    tensors = [TensorRef("f", name, shape, "F32", at) for name, shape, at in (
        ("k.a", (1, 32), 0), ("k.b", (32, 1), 128), ("q.a", (1, 32), 256), ("q.b", (32, 1), 384),
        ("v.a", (1, 32), 512), ("v.b", (32, 1), 640),
    )]  # fmt: skip
    by_name = {it.key: it for it in tensors}
    parts = [LowRank(it, by_name[f"{it}.a"], by_name[f"{it}.b"], 1.0) for it in "vqk"]
    prepared = mapped(table, 1, parts)
    assert sorted(run.num_bytes for run in in_runs(list(prepared.places)) if isinstance(run, Run)) == [256, 512]
    assert not prepared.cleared
    assert sorted((it.numel(), it.dtype) for it in prepared.checked) == [(64, torch.float32), (128, torch.bfloat16)]
    table.unmap(1)
    ragged = [LowRank("k", ref("a", 1, 31), ref("b", 32, 1), 1.0)]
    prepared = mapped(table, 1, ragged)
    (region,) = prepared.checked
    assert region.numel() == 64 and [it.data_ptr() for it in prepared.cleared] == [region.data_ptr()]
