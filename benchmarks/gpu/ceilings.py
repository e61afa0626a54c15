"""What the design takes for granted: what copies, products and launches cost on this device, and where memory lies."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch
import torch.nn.functional as F

from benchmarks.gpu.cases import Draw
from benchmarks.gpu.cases.lora import LLAMA, linear_case
from benchmarks.gpu.measure import Bench
from benchmarks.gpu.report import Row
from benchmarks.gpu.shapes import LINEARS, TOY_LINEARS
from kernels.lora import kernel as lora_kernel
from server.weights.choice import choose_arenas
from server.weights.padded_arena import PaddedArenas


def assumptions(bench: Bench) -> Iterator[Row]:
    yield bench.rates()
    yield from _products(bench)
    yield _launch_gap(bench)
    yield from _arena_beside_allocations(bench)
    yield from _lora_columns(bench)


def _products(bench: Bench) -> Iterator[Row]:
    """Each linear of both models as decodes of 1 to 128 rows call it."""
    draw = Draw(bench.scale, bench.scale.dtype, 0)
    for name, (out, depth) in (TOY_LINEARS if bench.scale.is_toy else LINEARS).items():
        copies = bench.scale.copies(out * depth * draw.dtype.itemsize)
        weights = [draw.randn(out, depth, scale=0.02) for _ in range(copies)]
        for rows in (1, 8, 32, 128) if not bench.scale.is_toy else (2,):
            x = draw.randn(rows, depth)
            num_bytes = weights[0].nbytes + (rows * (out + depth)) * x.itemsize
            calls = [lambda x=x, it=it: F.linear(x, it) for it in weights]
            yield {"GEMM": name, "rows": rows, **bench.timed(calls, num_bytes, 2 * rows * out * depth)}


def _launch_gap(bench: Bench) -> Row:
    """Of one of many small kernels that wait for each other: in a graph, and launched."""
    count = bench.scale.size(500, 3)
    x = torch.zeros(1024, device=bench.scale.device)

    def chain() -> None:
        for _ in range(count):
            x.add_(1.0)

    replay = bench.clock.captured(chain)
    replay()
    in_graph = min(bench.clock.events(replay) for _ in range(bench.scale.size(7, 1)))
    launched = min(bench.clock.events(chain) for _ in range(bench.scale.size(7, 1)))
    return {"case": f"{count} small kernels in a row", "us each in a graph": in_graph / count * 1e6,
            "us each launched": launched / count * 1e6}  # fmt: skip


def _arena_beside_allocations(bench: Bench) -> Iterator[Row]:
    """One product over weights from torch's allocator, and over the same weights in pages of an arena."""
    draw = Draw(bench.scale, bench.scale.dtype, 0)
    shape = (bench.scale.size(28672, 48), bench.scale.size(4096, 32))
    copies = bench.scale.copies(prod(shape) * draw.dtype.itemsize)
    allocated = [draw.randn(*shape, scale=0.02) for _ in range(copies)]
    arenas = choose_arenas(bench.scale.device)
    if isinstance(arenas, PaddedArenas):
        yield {"case": "arena beside allocations", "skipped": "no virtual memory on this device"}
        return
    step = -(-allocated[0].nbytes // arenas.page_bytes) * arenas.page_bytes
    arena = arenas.slabs(step * copies)
    arena.map(0, step * copies)
    in_pages = [arena.tensor(index * step, shape, draw.dtype) for index in range(copies)]
    for place, weights in zip(in_pages, allocated, strict=True):
        place.copy_(weights)
    for rows in (bench.scale.size(32, 2), bench.scale.size(2048, 3)):
        x = draw.randn(rows, shape[1])
        in_arena, plain = (bench.clock.seconds([lambda x=x, it=it: F.linear(x, it) for it in weights])
                           for weights in (in_pages, allocated))  # fmt: skip
        same = all(torch.equal(F.linear(x, a), F.linear(x, b)) for a, b in zip(in_pages, allocated, strict=True))
        yield {"case": f"{rows} rows, {shape[0]} x {shape[1]}", "allocated us": plain * 1e6,
               "in an arena us": in_arena * 1e6, "arena over allocated": in_arena / plain, "ok": same}  # fmt: skip


def _lora_columns(bench: Bench) -> Iterator[Row]:
    """How wide an expand's item should be, in one launch and in two."""
    sites = LLAMA if not bench.scale.is_toy else {"gate_up": (40, (32, 32))}
    tokens, adapters, rank = (32, 8, 16) if not bench.scale.is_toy else (5, 3, 4)
    for name, (depth, widths) in sites.items():
        for columns in (64, 128):
            for single in (True, False):
                draw = Draw(bench.scale, bench.scale.dtype, 0)
                case = linear_case(draw, name, depth, widths, tokens, adapters, rank, single)
                with _columns(columns):
                    yield {"LoRA": case.name, "columns": columns, **bench.timed(case.timed, case.num_bytes)}


@contextmanager
def _columns(count: int) -> Iterator[None]:
    before = lora_kernel.DECODE_COLUMNS
    lora_kernel.DECODE_COLUMNS = count
    try:
        yield
    finally:
        lora_kernel.DECODE_COLUMNS = before
