"""step_rows: a step's tokens, laid out on the device from what the host says of its sequences.

The host knows of each sequence how many tokens it computes and how many are in the cache then, but where steps overlap
it does not know the tokens that the step before chooses. So it sends a few numbers a sequence, and the blocks that came
to its block table; ids, positions and KV slots are made where they are read, in the same captured graph.

Block tables stay on the device, a row ("seat") for each sequence, as long as it takes part in steps: `write_tables`
adds to them, `step_rows` lists them in the order of the step.

Running example, blocks of 4 tokens. Sequence 0 (seat 3, the base's) decodes its 6th token, which is what the step
before chose in its row 1. Sequence 1 (seat 0, adapter slot 2) computes its tokens 3, 4 and 5, of which the host knows
the ids. The third sequence and the fifth token only pad the batch.

    runs           [[0, 1, 1, 0]], blocks [7]      seat 0 gets block 7 in column 1: its table is [4, 7] then
    query_starts   [0, 1, 4, 4]      kv_lens [6, 5, 0]     seats [3, 0, 0]      slots [0, 2, 0]
    sources        [1, -1, -1]       chosen [50, 60]       ids [0, 71, 72, 73, 0]

    token_ids      [60, 71, 72, 73, 0]
    positions      [5, 2, 3, 4, 0]
    slot_mapping   [9, 18, 19, 28, -1]     seat 3's table is [9, 2]: block 2, offset 1
    token_slots    [0, 2, 2, 2, 0]
    block_tables   [[9, 2], [4, 7], ..]
"""

from typing import NamedTuple

from torch import Tensor

from kernels.compiled import takes

__all__ = ["Sequences", "StepRows", "step_rows", "write_tables"]


class Sequences(NamedTuple):
    """Of a step, in its order. int32 each, [S] but for the first."""

    query_starts: Tensor  # [S + 1]: tokens of sequence s are [query_starts[s], query_starts[s + 1]) of the step
    kv_lens: Tensor  # tokens in the cache after the step; 0: it pads the batch
    seats: Tensor  # row of `tables`
    slots: Tensor  # adapter slot
    sources: Tensor  # where in `chosen` its last token is; -1: it is among the ids


class StepRows(NamedTuple):
    """What is written. int32 each."""

    token_ids: Tensor  # [T]; what the host knows of them is there before
    positions: Tensor  # [T]
    slot_mapping: Tensor  # [T]; -1: it pads the batch
    token_slots: Tensor  # [T]
    block_tables: Tensor  # [S, W]; behind a sequence's last block there may be anything


def write_tables(tables: Tensor, runs: Tensor, num_runs: Tensor, blocks: Tensor) -> None:
    """See reference.py for shapes."""
    if takes(tables):
        from kernels.step_rows import kernel

        return kernel.write_tables(tables, runs, num_runs, blocks)
    from kernels.step_rows import reference

    return reference.write_tables(tables, runs, num_runs, blocks)


def step_rows(sequences: Sequences, tables: Tensor, chosen: Tensor, block_size: int, rows: StepRows) -> None:
    """See reference.py for shapes."""
    if takes(tables):
        from kernels.step_rows import kernel

        return kernel.step_rows(sequences, tables, chosen, block_size, rows)
    from kernels.step_rows import reference

    return reference.step_rows(sequences, tables, chosen, block_size, rows)
