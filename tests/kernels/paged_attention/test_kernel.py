"""paged_attention's kernel against its reference; what must not be read is poisoned."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
import triton.language as tl
from torch import Tensor

from kernels.paged_attention import AttentionBatch, DeviceBatch, reference
from kernels.paged_attention import kernel as attention_kernel
from kernels.paged_attention.kernel import NO_LIMIT, paged_attention
from kernels.paged_attention.kernel import _launch as attention_op
from kernels.paged_attention.splits import kernel as splits_kernel
from kernels.paged_attention.tiles import Tile, choose_tile, split_dim
from kernels.paged_attention.work import kernel as work_kernel
from tests.support.breadth import always
from tests.support.device_batch import device_batch
from tests.support.kernel_device import DEVICE

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("poisoned_memory")]

ATOL = 2e-5  # float32 sums of up to a few hundred products of order 1
GARBAGE = NO_LIMIT  # a block number that faults, or is far outside, if it is ever looked up
MIXED = [(5, 5), (3, 11), (1, 1), (1, 9), (1, 4), (4, 4)]  # (new tokens, keys): prefills, a chunk, decodes
OPTIONS: list[dict[str, object]] = [
    {}, {"window": 5}, {"window": 1}, {"chunk": 4}, {"chunk": 3, "window": 2}, {"softcap": 3.0}, {"sinks": True},
    {"window": 6, "chunk": 8, "softcap": 2.0, "sinks": True},
]  # fmt: skip


@dataclass
class Case:
    """A batch, and its caches twice: with zeros (for the reference) and with NaN where nobody may look."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    poisoned_keys: Tensor
    poisoned_values: Tensor
    batch: AttentionBatch
    device_batch: DeviceBatch


def make_case(
    shapes: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    dim: int,
    value_dim: int | None,
    block_size: int = 4,
    extra_columns: int = 3,
) -> Case:
    """value_dim None: values are the first power of two of the keys, in the same memory (MLA)."""
    rng = random.Random(2)
    counts = [-(-kv_len // block_size) for _, kv_len in shapes]
    free = list(range(sum(counts) + 4))
    rng.shuffle(free)
    tables = [[free.pop() for _ in range(count)] for count in counts]
    num_blocks = sum(counts) + 4
    width = dim if value_dim is None else dim + value_dim
    storage = torch.zeros(num_blocks, block_size, kv_heads, width)
    poisoned = torch.full_like(storage, math.nan)
    for (_, kv_len), table in zip(shapes, tables, strict=True):
        for position in range(kv_len):
            block, offset = table[position // block_size], position % block_size
            storage[block, offset] = torch.randn(kv_heads, width)
            poisoned[block, offset] = storage[block, offset]

    def caches(storage: Tensor) -> tuple[Tensor, Tensor]:
        storage = storage.to(DEVICE)
        if value_dim is None:
            return storage, storage[..., : split_dim(dim)[0]]
        return storage[..., :dim], storage[..., dim:]  # strided views, and no storage of their own

    tokens = sum(query_len for query_len, _ in shapes)
    batch = AttentionBatch([q for q, _ in shapes], [kv for _, kv in shapes], tables, block_size, torch.float32)
    columns = max(counts) + extra_columns
    garbage = [[*table, *[-1 if index % 2 == 0 else GARBAGE] * (columns - len(table))]
               for index, table in enumerate(tables)]  # fmt: skip
    on_device = device_batch([q for q, _ in shapes], [kv for _, kv in shapes], garbage, DEVICE)
    query = torch.randn(tokens, heads, dim, device=DEVICE)
    return Case(query, *caches(storage), *caches(poisoned), batch, on_device)


def check(case: Case, options: dict[str, object], launches: int = 1, counted: Sequence[int] = ()) -> Tensor:
    """Kernel against reference; every launch the same, to the bit. Returns the output. counted: counters that are not
    zero before, and stay so."""
    arguments = dict(options)
    if arguments.pop("sinks", False):
        arguments["sinks"] = torch.randn(case.query.shape[1], device=DEVICE)
    expected = reference.paged_attention(case.query, case.key_cache, case.value_cache, case.batch, 0.3, **arguments)  # type: ignore[arg-type]
    outputs = []
    for _ in range(launches):
        got = paged_attention(case.query, case.poisoned_keys, case.poisoned_values, case.device_batch, 0.3, **arguments)  # type: ignore[arg-type]
        torch.testing.assert_close(got, expected, atol=ATOL, rtol=0)
        assert case.device_batch.counters.nonzero()[:, 0].tolist() == list(counted)
        outputs.append(got)
    assert all(torch.equal(outputs[0], other) for other in outputs)
    return outputs[0]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_mixed_batch(options: dict[str, object]) -> None:
    check(make_case(MIXED, heads=6, kv_heads=2, dim=16, value_dim=16), options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_decodes(options: dict[str, object]) -> None:
    check(make_case([(1, 1), (1, 4), (1, 5), (1, 0), (1, 70)], heads=2, kv_heads=1, dim=16, value_dim=16), options)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1), (8, 1), (2, 2), (6, 2), (16, 2)])
def test_groups_of_heads(heads: int, kv_heads: int) -> None:
    check(make_case(MIXED, heads, kv_heads, dim=16, value_dim=16), {"window": 7})


@pytest.mark.parametrize("shapes", [MIXED[:3], [(1, 40), (1, 3)]], ids=["mixed", "decodes"])
def test_more_heads_of_a_group_than_rows_of_a_tile(shapes: list[tuple[int, int]]) -> None:
    assert choose_tile(8, 19, 4).block_m < 19
    check(make_case(shapes, heads=38, kv_heads=2, dim=8, value_dim=8), {"sinks": True})


@pytest.mark.parametrize(("dim", "value_dim"), [(9, 5), (24, 24), (80, 80), (96, 96), (192, 128), (5, 9), (40, 32)])
def test_head_sizes(dim: int, value_dim: int) -> None:
    check(make_case([(3, 6), (1, 5)], heads=2, kv_heads=1, dim=dim, value_dim=value_dim), {})


@pytest.mark.parametrize(
    ("dim", "parts"),
    [(5, (16, 0)), (16, (16, 0)), (24, (32, 0)), (40, (32, 16)), (80, (64, 16)), (96, (64, 32)), (112, (128, 0)),
     (128, (128, 0)), (192, (128, 64)), (576, (512, 64))],
)  # fmt: skip
def test_split_dim(dim: int, parts: tuple[int, int]) -> None:
    assert split_dim(dim) == parts


@pytest.mark.parametrize("shapes", [MIXED, [(1, 50), (1, 0), (1, 5)]], ids=["mixed", "decodes"])
def test_latent_cache(shapes: list[tuple[int, int]]) -> None:
    check(make_case(shapes, heads=4, kv_heads=1, dim=40, value_dim=None), {})


@pytest.mark.parametrize("width", [16, 8])
def test_values_that_are_another_part_of_the_keys(width: int) -> None:
    case = make_case([(2, 5), (1, 9)], heads=2, kv_heads=1, dim=40, value_dim=None)
    case.value_cache, case.poisoned_values = case.value_cache[..., :width], case.poisoned_values[..., :width]
    check(case, {})


SPLIT: list[dict[str, object]] = [{"sinks": True, "softcap": 2.0}, {"window": 40}, {"chunk": 64}, {}]


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile of keys is a chunk where the work is little."""
    monkeypatch.setattr(attention_kernel, "least_keys", lambda _: 1)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("block_size", always([4, 16], 16))
@pytest.mark.parametrize("options", always(SPLIT, *SPLIT[:2]), ids=str)
def test_split_keys(block_size: int, options: dict[str, object]) -> None:
    """Lengths on either side of a block and of a tile; a long one among them, and one without keys."""
    lens = [0, 1, block_size, block_size + 1, 150, 33]
    case = make_case([(1, kv_len) for kv_len in lens], heads=4, kv_heads=2, dim=16, value_dim=8, block_size=block_size)
    out = check(case, options, launches=2)
    assert not out[0].any()


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("options", [{}, {"window": 30, "sinks": True}], ids=str)
def test_a_prompt_and_decodes_are_split_in_one_launch(options: dict[str, object]) -> None:
    """As captured for more new tokens and sequences than there are."""
    case = make_case([(1, 90), (9, 50), (1, 0), (1, 7)], heads=2, kv_heads=1, dim=16, value_dim=16)
    check(case, options)
    case.device_batch = widened(case.device_batch, sequences=6, max_query_len=512)
    check(case, options)


def widened(batch: DeviceBatch, sequences: int, max_query_len: int) -> DeviceBatch:
    """The batch among sequences without rows."""
    missing = sequences - len(batch.kv_lens)
    return DeviceBatch(
        torch.cat([batch.query_starts, batch.query_starts[-1:].expand(missing)]),
        torch.cat([batch.kv_lens, batch.kv_lens.new_zeros(missing)]),
        torch.cat([batch.block_tables, batch.block_tables.new_full((missing, batch.block_tables.shape[1]), -1)]),
        batch.counters, max_query_len,
    )  # fmt: skip


@pytest.mark.usefixtures("short_chunks")
def test_parts_are_added_up_level_by_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three levels, as latents; groups of one, two and three."""
    monkeypatch.setattr(attention_kernel, "processors", lambda _: 2)
    for module in (attention_kernel, splits_kernel):
        monkeypatch.setattr(module, "FAN", tl.constexpr(3))
    check(make_case([(1, 16 * 10), (1, 5)], heads=2, kv_heads=1, dim=40, value_dim=None), {}, launches=2)


@pytest.mark.usefixtures("short_chunks")
def test_a_group_of_one_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its counter would be another's: one that is counted already, as by programs of the next sequence, stays so."""
    monkeypatch.setattr(attention_kernel, "processors", lambda _: 2)
    for module in (attention_kernel, splits_kernel):
        monkeypatch.setattr(module, "FAN", tl.constexpr(3))
    case = make_case([(1, 16 * 10), (1, 5)], heads=2, kv_heads=1, dim=40, value_dim=None)
    counters = case.device_batch.counters
    counters[10] = 1  # of level 1's group of one, if it had one
    check(case, {}, counted=[10])


def test_no_two_groups_share_a_counter() -> None:
    """Those of two or more members, of all levels, are counted within their tile's parts."""
    fan = int(splits_kernel.FAN.value)
    for parts in range(2, 600):
        counters, active, step, level = set(), parts, 1, 0
        while active > 1:
            for first in range(0, active, fan):
                if min(active - first, fan) > 1:
                    counter = first * step + level
                    assert counter < parts and counter not in counters
                    counters.add(counter)
            active, step, level = -(-active // fan), step * fan, level + 1


@pytest.mark.parametrize("limits", [{}, {"window": 16}, {"chunk": 8}, {"window": 5, "chunk": 8}], ids=str)
def test_rows_that_pad_a_mixed_step_become_zero(limits: dict[str, int]) -> None:
    """A sequence of several rows with nothing in the cache: its positions are below zero."""
    case = make_case([(1, 5), (3, 20)], heads=2, kv_heads=1, dim=16, value_dim=16)
    batch, query = case.device_batch, torch.cat([case.query, torch.randn(30, 2, 16, device=DEVICE)])
    starts, kv_lens, tables = batch.query_starts, batch.kv_lens, batch.block_tables
    padded = DeviceBatch(
        torch.cat([starts, starts[-1:] + 30]), torch.cat([kv_lens, kv_lens[:1] * 0]),
        torch.cat([tables, tables[:1] * 0]), batch.counters, 64,
    )  # fmt: skip
    out = paged_attention(query, case.key_cache, case.value_cache, padded, 0.3, **limits)
    alone = paged_attention(case.query, case.key_cache, case.value_cache, batch, 0.3, **limits)
    torch.testing.assert_close(out[:4], alone, atol=1e-5, rtol=0)
    assert not out[4:].any()


@pytest.mark.usefixtures("short_chunks")
def test_more_sequences_than_are_looked_at_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_kernel, "SEQUENCES", tl.constexpr(2))
    check(make_case([(1, 9), (1, 0), (1, 40), (1, 3), (1, 20)], heads=1, kv_heads=1, dim=8, value_dim=8), {})
    check(make_case([(1, 20), (1, 3), (5, 40), (2, 2), (1, 1)], heads=1, kv_heads=1, dim=8, value_dim=8), {})


def test_chunks_do_not_follow_from_lengths() -> None:
    """A captured launch is replayed for other lengths: same tensors, same grid."""
    long = make_case([(1, 300), (1, 70)], heads=2, kv_heads=1, dim=16, value_dim=16)
    short = make_case([(1, 3), (1, 0)], heads=2, kv_heads=1, dim=16, value_dim=16)
    captured = DeviceBatch(*(getattr(long.device_batch, name).clone()
                             for name in ("query_starts", "kv_lens", "block_tables", "counters")), 1)  # fmt: skip
    forms = {id(case): case.device_batch for case in (long, short)}
    for case in (long, short, long):
        form = forms[id(case)]
        captured.kv_lens.copy_(form.kv_lens)
        captured.block_tables.fill_(GARBAGE)
        captured.block_tables[:, : form.block_tables.shape[1]] = form.block_tables
        case.device_batch = captured
        check(case, {})


def test_long_prefill_over_several_tiles() -> None:
    check(make_case([(21, 50), (30, 30), (1, 33)], heads=2, kv_heads=2, dim=8, value_dim=8), {"window": 20})


@pytest.mark.parametrize("block_m", [32, 128])
@pytest.mark.parametrize(("heads", "dim", "value_dim"), [(3, 16, 16), (8, 40, None)])
def test_tiles_of_many_queries(
    block_m: int, heads: int, dim: int, value_dim: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As bfloat16 takes them: float32 has tiles of 16 rows only."""
    if DEVICE == "cuda":
        pytest.skip("such tiles of float32 fit no GPU")
    monkeypatch.setattr(attention_kernel, "choose_tile", lambda *_: Tile(block_m, 16, 4, 2, 2))
    check(make_case([(21, 30), (1, 7), (12, 12), (2, 40)], heads, 1, dim, value_dim), {"window": 14})


@pytest.mark.parametrize("shapes", [MIXED, [(1, 70), (1, 0), (1, 5)]], ids=["mixed", "decodes"])
def test_bfloat16(shapes: list[tuple[int, int]]) -> None:
    case = make_case(shapes, heads=4, kv_heads=2, dim=32, value_dim=16)
    expected = reference.paged_attention(case.query, case.key_cache, case.value_cache, case.batch, 0.3)
    tensors = [tensor.bfloat16() for tensor in (case.query, case.poisoned_keys, case.poisoned_values)]
    got = paged_attention(*tensors, case.device_batch, 0.3)
    assert got.dtype == torch.bfloat16
    # inputs rounded to 8 bits move a score of order 3 by 1e-2 and more, and the interpreter truncates
    torch.testing.assert_close(got.float(), expected, atol=6e-2, rtol=2e-2)


def test_the_rows_of_a_query_may_be_strided() -> None:
    case = make_case(MIXED, heads=2, kv_heads=2, dim=8, value_dim=8)
    case.query = torch.randn(2, len(case.query), 8, device=DEVICE).transpose(0, 1)
    check(case, {})


def test_empty_batch() -> None:
    cache = torch.zeros(2, 4, 1, 8, device=DEVICE)
    empty = device_batch([], [], [], DEVICE)
    assert paged_attention(torch.zeros(0, 2, 8, device=DEVICE), cache, cache, empty, 1.0).shape == (0, 2, 8)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"sinks": True, "chunk": 4}], ids=str)
def test_the_reference_in_slices_of_queries(options: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(MIXED, heads=4, kv_heads=2, dim=8, value_dim=8)
    arguments = dict(options)
    if arguments.pop("sinks", False):
        arguments["sinks"] = torch.randn(4, device=DEVICE)
    outputs = []
    for most in (reference.MAX_SCORES, 50):
        monkeypatch.setattr(reference, "MAX_SCORES", most)
        outputs.append(reference.paged_attention(case.query, case.key_cache, case.value_cache, case.batch, 0.3,
                                                 **arguments))  # type: ignore[arg-type]  # fmt: skip
    torch.testing.assert_close(*outputs, atol=ATOL, rtol=0)


@pytest.mark.parametrize("limits", [{"chunk": 4}, {"chunk": 3, "window": 2}, {"window": 3}], ids=str)
def test_who_sees_whom(limits: dict[str, int]) -> None:
    """Reference and kernel, against the sentence in the reference's docstring."""
    length = 11
    case = make_case([(length, length)], heads=1, kv_heads=1, dim=8, value_dim=16)
    key_cache, values = torch.zeros_like(case.key_cache), torch.zeros_like(case.value_cache)
    for position in range(length):  # equal scores, and values that are the unit vector of their position
        block = int(case.device_batch.block_tables[0, position // 4])
        values[block, position % 4, 0, position] = 1
    outputs = [reference.paged_attention(case.query, key_cache, values, case.batch, 1.0, **limits),
               paged_attention(case.query, key_cache, values, case.device_batch, 1.0, **limits)]  # fmt: skip
    window, chunk = limits.get("window", length), limits.get("chunk", length)
    for out in outputs:
        for query in range(length):
            seen = [key for key in range(query + 1) if query - key < window and key // chunk == query // chunk]
            assert out[query, 0].nonzero().flatten().tolist() == seen


def test_attention_op_is_registered_rightly() -> None:
    case = make_case([(1, 5), (1, 40)], heads=2, kv_heads=1, dim=16, value_dim=8)
    batch = case.device_batch
    arguments = (case.query, case.key_cache.contiguous(), case.value_cache.contiguous(), batch.query_starts,
                 batch.kv_lens, batch.block_tables, batch.counters, 1, 0.3, 0, 0, 0.0, None)  # fmt: skip
    torch.library.opcheck(attention_op.registered, arguments, test_utils=("test_schema", "test_faketensor"))
