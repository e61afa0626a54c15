"""Our attention beside torch's for sequences of any length and FlashInfer's, over the same pages."""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, chain

import torch
from torch import Tensor

from benchmarks.gpu.cases import Draw
from benchmarks.gpu.cases.attention import Paged, shapes
from benchmarks.gpu.measure import Bench
from benchmarks.gpu.report import Row
from kernels.paged_attention.kernel import paged_attention
from tests.support.device_batch import device_batch

Attend = Callable[[Tensor, Tensor], Tensor]  # over a cache of keys and one of values


def side_by_side(bench: Bench) -> Iterator[Row]:
    """Latent attention is left out: the others have kernels of their own for it, with caches laid out otherwise."""
    draw = Draw(bench.scale, bench.scale.dtype, 1)
    drawn = [Paged.drawn(draw, shape) for shape in shapes(draw) if shape.value_dim == shape.dim]
    others: dict[str, Callable[[Paged], Attend]] = {"Heddle": _ours, "torch varlen": _torch, "FlashInfer": _flashinfer}
    for name, make in others.items():
        for paged in drawn:
            yield _row(bench, paged, name, make)


def _row(bench: Bench, paged: Paged, name: str, make: Callable[[Paged], Attend]) -> Row:
    """What is not there or does not run says why, and is no failure of ours. differs: from ours, as a part of the
    largest number."""
    row: Row = {"attention": paged.shape.name, "by": name}
    if not bench.scale.is_cuda and name != "Heddle":
        return row | {"skipped": "it needs a GPU"}
    try:
        attend = make(paged)
        got, want = attend(*paged.caches[0]).double(), _ours(paged)(*paged.caches[0]).double()
        calls = [partial(attend, *pair) for pair in paged.caches]
        taken = bench.timed(calls, paged.num_bytes, paged.num_ops)
    except Exception as error:
        if name == "Heddle":
            raise
        return row | {"skipped": f"on this GPU: {type(error).__name__}: {error}"}
    return row | taken | {"differs": float((got.view_as(want) - want).abs().max() / want.abs().max())}


def _ours(paged: Paged) -> Attend:
    batch, scale = device_batch(*paged.lists, paged.query.device), paged.shape.dim**-0.5
    return lambda keys, values: paged_attention(paged.query, keys, values, batch, scale, None, None, None, None)


def _torch(paged: Paged) -> Attend:
    """Its FlashAttention, which reads pages by a table."""
    from torch.nn.attention.varlen import varlen_attn

    device, width = paged.query.device, max(map(len, paged.tables))
    tables = _ints([[*table, *[0] * (width - len(table))] for table in paged.tables], device)
    starts, used = _starts(paged.shape.new, device), _ints(paged.shape.keys, device)
    new, keys = max(paged.shape.new), max(paged.shape.keys)

    def attend(key: Tensor, value: Tensor) -> Tensor:
        out = varlen_attn(paged.query, key, value, starts, None, new, keys, window_size=(-1, 0), enable_gqa=True,
                          seqused_k=used, block_table=tables)  # fmt: skip
        assert isinstance(out, Tensor)
        return out

    return attend


def _flashinfer(paged: Paged) -> Attend:
    """Planned beforehand, as it is meant to be: the plan's host time is not counted."""
    if importlib.util.find_spec("flashinfer") is None:
        raise ImportError("FlashInfer is not installed")
    import flashinfer

    device, shape, size = paged.query.device, paged.shape, paged.block_size
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=device)
    pages = _starts([len(table) for table in paged.tables], device)
    indices, last = _ints(list(chain(*paged.tables)), device), [1 + (keys - 1) % size for keys in shape.keys]
    heads = (shape.heads, shape.kv_heads, shape.dim, size)
    kind = {"q_data_type": paged.query.dtype, "kv_data_type": paged.query.dtype}
    if max(shape.new) == 1:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        wrapper.plan(pages, indices, _ints(last, device), *heads, **kind)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        wrapper.plan(_starts(shape.new, device), pages, indices, _ints(last, device), *heads, causal=True, **kind)
    return lambda key, value: wrapper.run(paged.query, (key, value))  # type: ignore[no-any-return]


def _starts(lengths: Sequence[int], device: torch.device) -> Tensor:
    return _ints(list(accumulate(lengths, initial=0)), device)


def _ints(values: Sequence[object], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)
