"""Reference of step_rows: the loops, as they are defined."""

from torch import Tensor

from kernels.step_rows import Sequences, StepRows


def write_tables(tables: Tensor, runs: Tensor, num_runs: Tensor, blocks: Tensor) -> None:
    """tables[seat, column : column + count] = blocks[at : at + count] for each run (seat, column, count, at).

    tables [seats, W], runs [most, 4], num_runs [1], blocks [N]: int32.
    """
    for seat, column, count, at in runs[: int(num_runs)].tolist():
        tables[seat, column : column + count] = blocks[at : at + count]


def step_rows(sequences: Sequences, tables: Tensor, chosen: Tensor, block_size: int, rows: StepRows) -> None:
    """Writes `rows`, as the example has it. tables [seats, W] int32; chosen [R] int64."""
    starts = sequences.query_starts.tolist()
    rows.positions.zero_()
    rows.slot_mapping.fill_(-1)
    rows.token_slots.zero_()
    rows.token_ids[starts[-1] :] = 0
    for index, (begin, end) in enumerate(zip(starts, starts[1:], strict=False)):
        kv_len, seat, slot, source = (int(it[index]) for it in sequences[1:])
        if not kv_len:
            rows.token_ids[begin:end] = 0
            continue
        width = -(-kv_len // block_size)
        rows.block_tables[index, :width] = tables[seat, :width]
        for row, position in zip(range(begin, end), range(kv_len - (end - begin), kv_len), strict=True):
            rows.positions[row], rows.token_slots[row] = position, slot
            rows.slot_mapping[row] = tables[seat, position // block_size] * block_size + position % block_size
        if source >= 0:
            rows.token_ids[end - 1] = chosen[source]
