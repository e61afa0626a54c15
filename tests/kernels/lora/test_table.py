"""What the host makes for lora's kernels: rows of a table, and what they promise."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from kernels.lora import NOTHING, TABLE_FIELDS, Field, LoraSite, LoraWeights, SiteAdapters, table_row, table_rows
from kernels.lora import kernel as lora_kernel


def test_a_table_row_keeps_the_scale_exactly() -> None:
    weights = LoraWeights(Tensor(8, 4), Tensor(4, 8), -0.1)
    row = table_row(weights)
    assert len(row) == TABLE_FIELDS and row[Field.RANK] == 8 and row[Field.NEXT] == 0
    assert torch.tensor(row)[Field.SCALE].int().view(torch.float32).item() == torch.tensor(-0.1).item()


def test_a_table_row_has_the_strides_of_experts() -> None:
    shared, apart = torch.empty(1, 8, 16).expand(3, 8, 16), torch.empty(3, 5, 8)[:, :4]
    row = table_row(LoraWeights(shared, apart, 1.0))
    assert (row[Field.RANK], row[Field.A_STRIDE], row[Field.B_STRIDE]) == (8, 0, 40)
    row = table_row(LoraWeights(shared[0], apart[0], 1.0))
    assert (row[Field.RANK], row[Field.A_STRIDE], row[Field.B_STRIDE]) == (8, 0, 0)


@pytest.mark.parametrize(
    ("depth", "itemsize", "aligned"), [(40, 2, True), (36, 2, False), (36, 4, True), (33, 4, False)]
)
def test_matrices_of_experts_are_read_in_vectors_where_their_rows_allow_it(
    depth: int, itemsize: int, aligned: bool
) -> None:
    assert lora_kernel.Kind(depth, 1, experts=4).is_aligned(itemsize) == aligned
    assert lora_kernel.Kind(depth, 1).is_aligned(itemsize)  # an adapter's only matrix begins at 16 bytes
    assert not lora_kernel.Kind(depth, 1, own_inputs=True).is_aligned(itemsize)


@pytest.mark.parametrize(("depth", "gap", "is_refused"), [(8, 0, False), (8, 4, False), (8, 3, True), (7, 3, False)])
def test_what_lies_between_experts_keeps_them_aligned(depth: int, gap: int, is_refused: bool) -> None:
    a = torch.empty(3, 2 * depth + gap)[:, : 2 * depth].view(3, 2, depth)
    held = SiteAdapters({1: [LoraWeights(a, torch.empty(3, 6, 2), 1.0)]})
    with pytest.raises(AssertionError) if is_refused else nullcontext():
        table_rows(LoraSite((6,), experts=3), held, 1)


def test_slot_0_of_a_table_says_whether_any_adapter_acts() -> None:
    site, held = LoraSite((4, 2)), SiteAdapters()
    assert table_rows(site, held, 0) == table_rows(site, held, 3) == [NOTHING] * 2
    held.by_slot[3] = [None, LoraWeights(torch.empty(8, 16), torch.empty(2, 8), 1.0)]
    assert [row[Field.A] for row in table_rows(site, held, 0)] == [1, 1]
    assert [row[Field.RANK] for row in table_rows(site, held, 3)] == [0, 8]
