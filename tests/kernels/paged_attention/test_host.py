"""paged_attention's host kernel against the obvious computation; what belongs to no sequence is NaN."""

import math
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kernels.paged_attention import DeviceBatch, paged_attention
from tests.support.device_batch import device_batch

pytestmark = pytest.mark.usefixtures("poisoned_memory", "host_kernels")

ATOL = 2e-5  # float32 sums of up to a few hundred products of order 1
# prefill from nothing, chunks in the middle, decodes on both sides of a block's and a tile's end, padding, nothing new
MIXED = (
    (7, 7),
    (3, 11),
    (1, 1),
    (1, 4),
    (1, 0),
    (1, 5),
    (1, 63),
    (12, 13),
    (1, 64),
    (0, 9),
    (1, 65),
    (70, 150),
    (1, 130),
)
DECODES = tuple((1, keys) for keys in (1, 2, 5, 16, 17, 33, 64, 100, 0, 129))


class Step(NamedTuple):
    """query [T, Hq, D]; of each sequence keys [n, Hkv, D] and values [n, Hkv, Dv], as they lie in the caches."""

    shapes: Sequence[tuple[int, int]]
    query: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    caches: tuple[Tensor, Tensor]
    batch: DeviceBatch

    def attended(self, scale: float, **options: Any) -> Tensor:
        return paged_attention(self.query, *self.caches, self.batch, scale, **options)

    def rows(self, sequence: int) -> slice:
        start = sum(new for new, _ in self.shapes[:sequence])
        return slice(start, start + self.shapes[sequence][0])


def a_step(shapes: Sequence[tuple[int, int]], heads: int, kv_heads: int, depth: int, width: int, block: int,
           dtype: torch.dtype = torch.float32, latent: bool = False) -> Step:  # fmt: skip
    """latent: values are the first columns of the keys, in one cache. All are views with NaN around them."""
    tables: list[list[int]] = []
    blocks = list(range(2 + sum(-(-keys // block) for _, keys in shapes)))
    random.Random(5).shuffle(blocks)
    for _, keys in shapes:
        tables.append([blocks.pop() for _ in range(-(-keys // block))])
    count = 2 + sum(map(len, tables))
    whole = torch.full((count, 2, block, kv_heads, max(depth, width)), math.nan, dtype=dtype)
    caches = whole[:, 0, ..., :depth], whole[:, 0 if latent else 1, ..., :width]
    all_keys, all_values = [], []
    for (_, keys), table in zip(shapes, tables, strict=True):
        for position in range(keys):
            at = table[position // block], position % block
            caches[0][at] = torch.randn(kv_heads, depth).to(dtype)
            if not latent:
                caches[1][at] = torch.randn(kv_heads, width).to(dtype)
        taken = [cache[table].flatten(0, 1)[:keys] for cache in caches]
        all_keys.append(taken[0])
        all_values.append(taken[1])
    tokens = sum(new for new, _ in shapes)
    fused = torch.full((tokens, heads + 2, depth + 3), math.nan, dtype=dtype)
    fused[:, 1:-1, :depth] = torch.randn(tokens, heads, depth).to(dtype)
    batch = device_batch([new for new, _ in shapes], [keys for _, keys in shapes], tables, "cpu")
    return Step(shapes, fused[:, 1:-1, :depth], all_keys, all_values, caches, batch)


def expected(step: Step, scale: float, window: int | None = None, chunk: int | None = None,
             softcap: float | None = None, sinks: Tensor | None = None) -> Tensor:  # fmt: skip
    """In float64, every score of every query."""
    heads, outs = step.query.shape[1], []
    for index, (new, count) in enumerate(step.shapes):
        query = step.query[step.rows(index)].double()
        keys, values = (it[index].double() for it in (step.keys, step.values))
        if count == 0:
            outs.append(torch.zeros(new, heads, values.shape[-1], dtype=torch.float64))
            continue
        keys, values = (it.repeat_interleave(heads // it.shape[1], 1) for it in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", query, keys) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        at, key = torch.arange(count - new, count)[:, None], torch.arange(count)[None]
        seen = key <= at
        if window is not None:
            seen &= key > at - window
        if chunk is not None:
            seen &= key // chunk == at // chunk
        scores = scores.masked_fill(~seen, -math.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.double()[:, None, None].expand(heads, new, 1)], -1)
        weights = scores.softmax(-1)[..., :count]
        outs.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(outs)


def check(step: Step, scale: float, **options: Any) -> None:
    got, wanted = step.attended(scale, **options), expected(step, scale, **options)
    assert got.dtype == step.query.dtype and got.is_contiguous()
    # bfloat16 is rounded once, at the end
    rtol = 0 if got.dtype == torch.float32 else 2**-8
    torch.testing.assert_close(got.double(), wanted, atol=ATOL, rtol=rtol)


SHAPES = [
    (1, 1, 8, 8), (6, 2, 24, 24), (4, 4, 48, 48), (8, 4, 64, 64), (8, 1, 80, 80), (8, 2, 128, 128), (6, 6, 9, 5),
    (12, 4, 16, 16), (10, 2, 96, 64), (16, 1, 64, 64), (7, 1, 33, 33), (18, 2, 20, 12), (4, 2, 1, 1), (40, 8, 64, 64),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [1, 4, 16, 32])
@pytest.mark.parametrize(("heads", "kv_heads", "depth", "width"), SHAPES)
def test_shapes(heads: int, kv_heads: int, depth: int, width: int, block: int, dtype: torch.dtype) -> None:
    check(a_step(MIXED, heads, kv_heads, depth, width, block, dtype), depth**-0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "depth", "width"), [(16, 576, 512), (128, 576, 512), (4, 40, 32), (16, 257, 256)])
def test_latents(heads: int, depth: int, width: int, dtype: torch.dtype) -> None:
    """MLA absorbed: one head of keys, of which values are a part."""
    check(a_step(((5, 40), (1, 33), (1, 70), (1, 0)), heads, 1, depth, width, 16, dtype, latent=True), depth**-0.5)


OPTIONS: list[dict[str, Any]] = [
    {"window": 1}, {"window": 5}, {"window": 64}, {"window": 100}, {"chunk": 4}, {"chunk": 64}, {"chunk": 50},
    {"softcap": 3.0}, {"softcap": 50.0}, {"window": 7, "softcap": 2.0}, {"chunk": 50, "softcap": 0.5},
    {"window": 20, "chunk": 30}, {"sinks": True}, {"sinks": True, "window": 3, "softcap": 2.0},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "depth"), [(4, 2, 32), (16, 1, 32), (3, 1, 9), (16, 1, 272)])
def test_who_sees_whom(heads: int, kv_heads: int, depth: int, options: dict[str, Any]) -> None:
    its = dict(options)
    if "sinks" in its:
        its["sinks"] = torch.randn(heads)
    check(a_step(MIXED, heads, kv_heads, depth, depth, 4), 0.3, **its)


@pytest.mark.parametrize(("heads", "kv_heads", "depth"), [(8, 4, 64), (16, 1, 16), (6, 2, 10)])
def test_bits_do_not_depend_on_threads(heads: int, kv_heads: int, depth: int) -> None:
    """Nor on who else is in the step: with enough sequences a task is all heads of one."""
    step = a_step((*DECODES, *MIXED), heads, kv_heads, depth, depth, 16)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(step.attended(0.2))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    batch = step.batch
    for sequence in range(len(step.shapes)):
        rows = step.rows(sequence)
        starts = torch.tensor([0, rows.stop - rows.start], dtype=torch.int32)
        alone = DeviceBatch(starts, batch.kv_lens[sequence:][:1], batch.block_tables[sequence:][:1], batch.counters, 1)
        got = paged_attention(step.query[rows], *step.caches, alone, 0.2)
        assert torch.equal(got, found[0][rows])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("what", ["query", "keys", "values"])
@pytest.mark.parametrize(("heads", "kv_heads", "depth"), [(8, 4, 64), (16, 1, 16), (3, 3, 6)])
def test_what_is_not_finite_shows_in_its_own_sequence_only(
    heads: int, kv_heads: int, depth: int, what: str, value: float
) -> None:
    """Every sequence in turn, in its last token; it belongs to the last head."""
    step = a_step(((1, 20), (5, 30), (1, 70), (3, 3), (1, 1), (1, 40)), heads, kv_heads, depth, depth, 8)
    clean = step.attended(0.2)
    group = heads // kv_heads
    for sequence, (_, count) in enumerate(step.shapes):
        rows = step.rows(sequence)
        if what == "query":
            at = step.query[rows.stop - 1, -1]
        else:
            cache = step.caches[what == "values"]
            at = cache[step.batch.block_tables[sequence, (count - 1) // 8], (count - 1) % 8, -1]
        kept = at.clone()
        at.fill_(value)
        got = step.attended(0.2)
        at.copy_(kept)
        others = torch.ones(len(got), dtype=torch.bool)
        others[rows] = False
        assert torch.equal(got[others], clean[others])
        assert torch.equal(got[rows, : heads - group], clean[rows, : heads - group])
        # a key of infinities has scores of both signs' infinity: beside a finite one it may weigh nothing
        if what != "keys" or math.isnan(value):
            assert not got[rows.stop - 1, -1].isfinite().any()


def test_scores_far_from_zero() -> None:
    """Every exponential of them would overflow, or vanish."""
    step = a_step(MIXED, 4, 2, 16, 16, 4)
    for offset in (-1000.0, 1000.0):
        for keys in step.caches[0], *step.keys:
            keys[..., 0] = torch.where(keys[..., 0].isnan(), keys[..., 0], offset)
        step.query[..., 0] = 1.0
        wanted = expected(step, 1.0)
        torch.testing.assert_close(step.attended(1.0).double(), wanted, atol=2e-3, rtol=0)


def test_a_step_of_nothing() -> None:
    step = a_step(((0, 5), (0, 0)), 4, 2, 16, 16, 4)
    assert step.attended(1.0).shape == (0, 4, 16)
    step = a_step(((1, 0), (3, 0)), 4, 2, 16, 16, 4)
    assert step.attended(1.0).tolist() == torch.zeros(4, 4, 16).tolist()


def test_transposed_heads() -> None:
    """As the attention interface has them; and a query whose elements are not next to each other is copied."""
    step = a_step(MIXED, 4, 2, 16, 16, 4)
    wanted = step.attended(0.25)
    for query in (step.query.transpose(0, 1).contiguous().transpose(0, 1), step.query.mT.contiguous().mT):
        assert query.stride() != step.query.contiguous().stride()
        assert torch.equal(step._replace(query=query).attended(0.25), wanted)
