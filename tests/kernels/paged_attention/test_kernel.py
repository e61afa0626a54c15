"""paged_attention's kernel against its reference; what must not be read is poisoned."""

import math
import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels.paged_attention import AttentionBatch, DeviceBatch, reference, splits_decodes
from kernels.paged_attention import kernel as attention_kernel
from kernels.paged_attention.kernel import NO_LIMIT, paged_attention
from kernels.paged_attention.kernel import _launch as attention_op
from kernels.paged_attention.tiles import Tile, choose_tile, split_dim
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


def check(case: Case, options: dict[str, object], launches: int = 1) -> Tensor:
    """Kernel against reference; every launch the same, to the bit. Returns the output."""
    arguments = dict(options)
    if arguments.pop("sinks", False):
        arguments["sinks"] = torch.randn(case.query.shape[1], device=DEVICE)
    expected = reference.paged_attention(case.query, case.key_cache, case.value_cache, case.batch, 0.3, **arguments)  # type: ignore[arg-type]
    outputs = []
    for _ in range(launches):
        got = paged_attention(case.query, case.poisoned_keys, case.poisoned_values, case.device_batch, 0.3, **arguments)  # type: ignore[arg-type]
        torch.testing.assert_close(got, expected, atol=ATOL, rtol=0)
        assert not case.device_batch.counters.any()
        outputs.append(got)
    assert all(torch.equal(outputs[0], other) for other in outputs)
    return outputs[0]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_mixed_batch(options: dict[str, object]) -> None:
    check(make_case(MIXED, heads=6, kv_heads=2, dim=16, value_dim=16), options)


@pytest.mark.parametrize("options", [{}, {"window": 6, "chunk": 8, "softcap": 2.0, "sinks": True}], ids=str)
def test_decodes_with_a_launch_of_their_own(options: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.paged_attention.batch.LONG_DECODE", 8)
    case = make_case([*MIXED, (1, 70)], heads=6, kv_heads=2, dim=16, value_dim=16)
    assert case.device_batch.splits_decodes
    check(case, options, launches=2)


def test_only_long_decodes_beside_others_have_a_launch_of_their_own() -> None:
    assert splits_decodes([1, 300], [2000, 300])
    assert not splits_decodes([1, 300], [1000, 3000])
    assert not splits_decodes([1, 1], [2000, 2000]) and not splits_decodes([], [])


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


@pytest.mark.parametrize("block_size", always([4, 16], 16))
@pytest.mark.parametrize("options", always(SPLIT, *SPLIT[:2]), ids=str)
def test_split_keys(block_size: int, options: dict[str, object]) -> None:
    """Lengths on either side of a block and of a tile; one that gives every split work, and one without keys."""
    lens = [0, 1, block_size, block_size + 1, 32, 33, 100]
    case = make_case([(1, kv_len) for kv_len in lens], heads=4, kv_heads=2, dim=16, value_dim=8, block_size=block_size)
    out = check(case, options, launches=2)
    assert not out[0].any()


def test_splits_do_not_follow_from_lengths() -> None:
    """A captured launch is replayed for other lengths: same tensors, same grid."""
    long = make_case([(1, 100), (1, 70)], heads=2, kv_heads=1, dim=16, value_dim=16)
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
    monkeypatch.setattr(attention_kernel, "choose_tile", lambda *_: Tile(block_m, 16, 4, 2))
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
                 batch.kv_lens, batch.block_tables, batch.counters, 1, False, 0.3, 0, 0, 0.0, None)  # fmt: skip
    torch.library.opcheck(attention_op, arguments, test_utils=("test_schema", "test_faketensor"))
