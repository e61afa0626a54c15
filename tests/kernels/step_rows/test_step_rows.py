"""step_rows: the example of its page, and the kernel against the reference."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.step_rows import Sequences, StepRows, kernel, reference
from tests.support.kernel_device import DEVICE


def numbers(*values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def rows_of(ids: list[int], sequences: int, width: int) -> StepRows:
    """With something in it from an earlier step."""
    others = [torch.full((len(ids),), 77, dtype=torch.int32, device=DEVICE) for _ in range(3)]
    return StepRows(numbers(*ids), *others, torch.full((sequences, width), 77, dtype=torch.int32, device=DEVICE))


@pytest.mark.parametrize("it", [reference, kernel])
def test_the_example(it: Any) -> None:
    tables = numbers([4, 0], [0, 0], [0, 0], [9, 2])
    it.write_tables(tables, numbers([0, 1, 1, 0], [1, 0, 1, 0]), numbers(1), numbers(7))
    assert tables.tolist() == [[4, 7], [0, 0], [0, 0], [9, 2]]
    sequences = Sequences(numbers(0, 1, 4, 4), numbers(6, 5, 0), numbers(3, 0, 0), numbers(0, 2, 0), numbers(1, -1, -1))
    rows = rows_of([0, 71, 72, 73, 0], 3, 2)
    it.step_rows(sequences, tables, numbers(50, 60, dtype=torch.int64), 4, rows)
    assert rows.token_ids.tolist() == [60, 71, 72, 73, 0]
    assert rows.positions.tolist() == [5, 2, 3, 4, 0]
    assert rows.slot_mapping.tolist() == [9, 18, 19, 28, -1]
    assert rows.token_slots.tolist() == [0, 2, 2, 2, 0]
    assert rows.block_tables.tolist() == [[9, 2], [4, 7], [77, 77]]


@pytest.mark.parametrize("seed", range(4))
def test_the_kernel_is_the_reference(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_TOKENS", 4)
    monkeypatch.setattr(kernel, "_COLUMNS", 2)
    rng = random.Random(seed)
    seats, width, block_size = 9, 7, 3
    count = rng.choice([1, 3, 9])
    lengths = [rng.choice([0, 1, 1, rng.randrange(1, 6)]) for _ in range(count)]
    kv_lens = [rng.randrange(it, width * block_size + 1) if it else 0 for it in lengths]
    starts = [sum(lengths[:index]) for index in range(count + 1)]
    sequences = Sequences(
        numbers(*starts), numbers(*kv_lens), numbers(*rng.sample(range(seats), count)),
        numbers(*(rng.randrange(4) for _ in lengths)), numbers(*(rng.choice([-1, 0, 1]) for _ in lengths)),
    )  # fmt: skip
    ids = [rng.randrange(100) for _ in range(starts[-1] + rng.randrange(3) or 1)]
    chosen = numbers(200, 201, dtype=torch.int64)
    found = []
    for it in (reference, kernel):
        tables = torch.arange(seats * width, dtype=torch.int32, device=DEVICE).view(seats, width)
        runs = numbers([2, 1, 5, 0], [5, 6, 1, 5], [8, 0, 0, 6])
        it.write_tables(tables, runs, numbers(3), torch.arange(300, 306, dtype=torch.int32, device=DEVICE))
        rows = rows_of(ids, count, width)
        it.step_rows(sequences, tables, chosen, block_size, rows)
        found.append((tables, *rows))
    for theirs, ours in zip(*found, strict=True):
        assert torch.equal(theirs, ours)
