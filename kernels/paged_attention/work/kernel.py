"""How a program finds its work: two passes over the lengths of the sequences, some hundred at a time.

A table made by a launch of its own would cost each step that launch, and each layer with another window another one;
here the lengths of a few hundred sequences are a load and a sum each, on the way to the first block of keys.
"""

import triton
import triton.language as tl

SEQUENCES = tl.constexpr(256)  # that are looked at together


@triton.jit
def query_tiles(query_len, QUERIES: tl.constexpr, DECODE: tl.constexpr):
    """Of a sequence, or of many."""
    if DECODE:
        return tl.minimum(query_len, 1)
    else:
        return (query_len + QUERIES - 1) // QUERIES


@triton.jit
def key_tiles(kv_len, window, chunk, QUERIES: tl.constexpr, BLOCK_N: tl.constexpr, LIMITED: tl.constexpr):
    """The most that a query tile of a sequence sees; of a sequence, or of many."""
    seen = kv_len
    if LIMITED:
        seen = tl.minimum(tl.minimum(tl.minimum(window, chunk), kv_len) + QUERIES, kv_len)
    return (seen + BLOCK_N - 1) // BLOCK_N


@triton.jit
def _some(indices, first, num_sequences, window, chunk, QUERIES: tl.constexpr, BLOCK_N: tl.constexpr,
          LIMITED: tl.constexpr, DECODE: tl.constexpr):  # fmt: skip
    """(query tiles, tiles of keys) of the sequences from `first` on; none behind the last."""
    at = first + tl.arange(0, SEQUENCES)
    there = at < num_sequences
    starts = tl.load(indices.query_starts + at, mask=there, other=0)
    ends = tl.load(indices.query_starts + at + 1, mask=there, other=0)
    kv_lens = tl.load(indices.kv_lens + at, mask=there, other=0)
    tiles = query_tiles(ends - starts, QUERIES, DECODE)
    return tiles, key_tiles(kv_lens, window, chunk, QUERIES, BLOCK_N, LIMITED)


@triton.jit
def chunk_tiles(indices, num_sequences, spare, least, window, chunk, QUERIES: tl.constexpr, BLOCK_N: tl.constexpr,
                LIMITED: tl.constexpr, DECODE: tl.constexpr):  # fmt: skip
    """How many tiles of keys are a chunk."""
    work = 0
    for first in range(0, num_sequences, SEQUENCES):
        tiles, keys = _some(indices, first, num_sequences, window, chunk, QUERIES, BLOCK_N, LIMITED, DECODE)
        work += tl.sum(tiles * keys)
    return tl.maximum((work + spare - 1) // spare, least)


@triton.jit
def find_sequence(indices, number, length, num_sequences, window, chunk, QUERIES: tl.constexpr, BLOCK_N: tl.constexpr,
                  LIMITED: tl.constexpr, DECODE: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    """(sequence, its first number, its first part) of the program of a number; behind the last sequence: nobody's.

    length: of a chunk, in tiles of keys. Numbers are counted over the sequences' tiles and chunks, parts over those
    that have several chunks.
    """
    sequence = 0
    numbers = 0
    parts = 0
    counted = 0
    for first in range(0, num_sequences, SEQUENCES):
        tiles, keys = _some(indices, first, num_sequences, window, chunk, QUERIES, BLOCK_N, LIMITED, DECODE)
        chunks = tl.full((SEQUENCES,), 1, tl.int32)
        if SPLIT:
            chunks = tl.maximum((keys + length - 1) // length, 1)
        count = tiles * chunks
        before = counted + tl.cumsum(count, 0) <= number
        before = before & (first + tl.arange(0, SEQUENCES) < num_sequences)
        sequence += tl.sum(before.to(tl.int32))
        numbers += tl.sum(tl.where(before, count, 0))
        if SPLIT:
            parts += tl.sum(tl.where(before & (chunks > 1), count, 0))
        counted += tl.sum(count)
    return sequence, numbers, parts
