"""Triton form of step_rows: a program a run of blocks; then a program for some tokens, or a sequence's block table."""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from kernels.compiled.kernel import Configuration
from kernels.compiled.launch import launch
from kernels.step_rows import Sequences, StepRows

_TOKENS = 64  # a program
_COLUMNS = 256  # of a block table, at a time


@triton.jit(do_not_specialize=["stride"])
def write_tables_kernel(tables, stride, runs, num_runs, blocks, COLUMNS: tl.constexpr):
    """Programs: runs."""
    run = tl.program_id(0)
    if run < tl.load(num_runs):
        seat, column = tl.load(runs + run * 4), tl.load(runs + run * 4 + 1)
        count, at = tl.load(runs + run * 4 + 2), tl.load(runs + run * 4 + 3)
        target = tables + seat.to(tl.int64) * stride + column
        lane = tl.arange(0, COLUMNS)
        for first in range(0, count, COLUMNS):
            mask = first + lane < count
            tl.store(target + first + lane, tl.load(blocks + at + first + lane, mask=mask), mask=mask)


@triton.jit
def _lay_out_tokens(
    block, sequences, tables, stride, chosen, rows, T, S,
    BLOCK_SIZE: tl.constexpr, TOKENS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens of the step. STEPS: halvings that find one among S sequences."""
    t = block * TOKENS + tl.arange(0, TOKENS)
    in_step = t < T
    low = tl.zeros((TOKENS,), tl.int32)  # the last sequence that begins at or before the token
    high = tl.zeros((TOKENS,), tl.int32) + S
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        begins = tl.load(sequences.query_starts + middle, mask=middle < S, other=2**31 - 1)
        found = (begins <= t) & (middle > low)
        low = tl.where(found, middle, low)
        high = tl.where(found, high, middle)
    s = low
    end = tl.load(sequences.query_starts + s + 1)
    kv_len = tl.load(sequences.kv_lens + s)
    real = in_step & (t < end) & (kv_len > 0)
    position = tl.where(real, kv_len - (end - t), 0)
    seat = tl.load(sequences.seats + s).to(tl.int64)
    kv_block = tl.load(tables + seat * stride + position // BLOCK_SIZE, mask=real, other=0)
    source = tl.load(sequences.sources + s)
    known = tl.load(rows.token_ids + t, mask=real, other=0)
    feeds = real & (t == end - 1) & (source >= 0)
    token = tl.where(feeds, tl.load(chosen + source, mask=feeds, other=0).to(tl.int32), known)
    tl.store(rows.token_ids + t, token, mask=in_step)
    tl.store(rows.positions + t, position, mask=in_step)
    tl.store(rows.slot_mapping + t, tl.where(real, kv_block * BLOCK_SIZE + position % BLOCK_SIZE, -1), mask=in_step)
    tl.store(rows.token_slots + t, tl.where(real, tl.load(sequences.slots + s), 0), mask=in_step)


@triton.jit(do_not_specialize=["T", "S", "stride", "out_stride"])
def step_rows_kernel(
    sequences, tables, stride, chosen, rows, out_stride, T, S,
    BLOCK_SIZE: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Programs: blocks of tokens, then sequences."""
    program = tl.program_id(0)
    token_blocks = tl.cdiv(T, TOKENS)
    if program < token_blocks:
        _lay_out_tokens(program, sequences, tables, stride, chosen, rows, T, S, BLOCK_SIZE, TOKENS, STEPS)
    else:
        s = program - token_blocks
        width = tl.cdiv(tl.load(sequences.kv_lens + s), BLOCK_SIZE)
        source = tables + tl.load(sequences.seats + s).to(tl.int64) * stride
        target = rows.block_tables + s.to(tl.int64) * out_stride
        lane = tl.arange(0, COLUMNS)
        for first in range(0, width, COLUMNS):
            mask = first + lane < width
            tl.store(target + first + lane, tl.load(source + first + lane, mask=mask), mask=mask)


@launch("write_tables", mutates_args=("tables",))
def _write_tables(tables: Tensor, runs: Tensor, num_runs: Tensor, blocks: Tensor) -> None:
    write_tables_kernel[(len(runs),)](tables, tables.stride(0), runs, num_runs, blocks, COLUMNS=_COLUMNS)


@_write_tables.register_fake
def _(*_: object) -> None:
    return None


@launch("step_rows", mutates_args=("token_ids", "positions", "slot_mapping", "token_slots", "block_tables"))
def _step_rows(
    query_starts: Tensor, kv_lens: Tensor, seats: Tensor, slots: Tensor, sources: Tensor, tables: Tensor,
    chosen: Tensor, block_size: int, token_ids: Tensor, positions: Tensor, slot_mapping: Tensor, token_slots: Tensor,
    block_tables: Tensor,
) -> None:  # fmt: skip
    tokens, count = len(token_ids), len(kv_lens)
    rows = StepRows(token_ids, positions, slot_mapping, token_slots, block_tables)
    step_rows_kernel[(triton.cdiv(tokens, _TOKENS) + count,)](
        Sequences(query_starts, kv_lens, seats, slots, sources), tables, tables.stride(0), chosen, rows,
        block_tables.stride(0), tokens, count, **_constants(block_size, len(tables)),
    )  # fmt: skip


@_step_rows.register_fake
def _(*_: object) -> None:
    return None


def _constants(block_size: int, most_sequences: int) -> dict[str, int]:
    return dict(BLOCK_SIZE=block_size, TOKENS=_TOKENS, COLUMNS=_COLUMNS, STEPS=most_sequences.bit_length() + 1)


def write_tables(tables: Tensor, runs: Tensor, num_runs: Tensor, blocks: Tensor) -> None:
    """As in reference.py."""
    _write_tables(tables, runs, num_runs, blocks)


def step_rows(sequences: Sequences, tables: Tensor, chosen: Tensor, block_size: int, rows: StepRows) -> None:
    """As in reference.py."""
    _step_rows(*sequences, tables, chosen, block_size, *rows)


def configurations() -> Iterator[Configuration]:
    """For up to 256 sequences, and blocks of 16 tokens."""
    pointer = "*i32:16"
    types = dict(tables=pointer, stride="i32", runs=pointer, num_runs=pointer, blocks=pointer)
    yield Configuration("write_tables", write_tables_kernel, types, {"COLUMNS": _COLUMNS})
    types = dict(sequences=Sequences(*[pointer] * 5), tables=pointer, stride="i32", chosen="*i64:16",
                 rows=StepRows(*[pointer] * 5), out_stride="i32", T="i32", S="i32")  # fmt: skip
    yield Configuration("step_rows", step_rows_kernel, types, _constants(16, 256))
