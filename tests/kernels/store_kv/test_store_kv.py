"""store_kv's kernels against its reference."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kernels.store_kv import host as store_host
from kernels.store_kv import reference as store_reference
from kernels.store_kv.kernel import _store_kv, _store_latent, store_kv, store_latent
from tests.support.kernel_device import DEVICE

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("poisoned_memory")]


Stores = tuple[Callable[..., Any], Callable[..., Any]]
ON_THE_HOST = pytest.mark.skipif(DEVICE != "cpu", reason="reads memory of the host")


@pytest.fixture(params=["kernel", pytest.param("host", marks=ON_THE_HOST)])
def stores(request: pytest.FixtureRequest) -> Stores:
    """store_kv and store_latent."""
    if request.param == "kernel":
        return store_kv, store_latent
    request.getfixturevalue("host_kernels")
    return store_host.store_kv, store_host.store_latent


@pytest.mark.parametrize(("kv_heads", "dim", "value_dim"), [(1, 9, 5), (2, 16, 16), (3, 24, 8), (70, 80, 64)])
@pytest.mark.parametrize("index_type", [torch.int32, torch.int64])
def test_store_kv(kv_heads: int, dim: int, value_dim: int, index_type: torch.dtype, stores: Stores) -> None:
    tokens, blocks, block_size = 6, 5, 4
    key = torch.randn(kv_heads, tokens, dim, device=DEVICE).transpose(0, 1)  # as the attention interface has them
    value = torch.randn(kv_heads, tokens, value_dim + 3, device=DEVICE).transpose(0, 1)[..., :value_dim]
    slot_mapping = torch.tensor([3, -1, 19, 0, -7, 8], dtype=index_type, device=DEVICE)
    caches = []
    for store in (store_reference.store_kv, stores[0]):
        both = torch.full((blocks, 2, block_size, kv_heads, max(dim, value_dim)), math.nan, device=DEVICE)
        store(key, value, both[:, 0, ..., :dim], both[:, 1, ..., :value_dim], slot_mapping)
        caches.append(both)
    assert torch.equal(caches[0].nan_to_num(7), caches[1].nan_to_num(7))
    assert int((~caches[1][:, 0].isnan()).sum()) == 4 * kv_heads * dim  # what was stored, and nothing beside it
    assert torch.equal(caches[1][4, 0, 3, :, :dim], key[2])


def test_store_latent(stores: Stores) -> None:
    latent, rope = torch.randn(5, 32, device=DEVICE), torch.randn(5, 1, 8, device=DEVICE)[:, 0]
    slot_mapping = torch.tensor([5, 2, -1, 11, 0], device=DEVICE)
    caches = [torch.full((3, 4, 1, 40), math.nan, device=DEVICE) for _ in range(2)]
    store_reference.store_latent(latent, rope, caches[0], slot_mapping)
    stores[1](latent, rope, caches[1], slot_mapping)
    assert torch.equal(caches[0].nan_to_num(7), caches[1].nan_to_num(7))
    assert torch.equal(caches[1][2, 3, 0], torch.cat([latent[3], rope[3]]))
    assert caches[1].isnan().any(-1).sum() == 8


def test_store_ops_are_registered_rightly() -> None:
    cache, slot_mapping = torch.zeros(3, 4, 2, 8, device=DEVICE), torch.tensor([1, -1], device=DEVICE)
    rows = torch.randn(2, 2, 8, device=DEVICE)
    test_utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(_store_kv.registered, (rows, rows, cache, cache.clone(), slot_mapping), test_utils=test_utils)
    latent, rope = torch.randn(2, 32, device=DEVICE), torch.randn(2, 8, device=DEVICE)
    cache = torch.zeros(3, 4, 1, 40, device=DEVICE)
    torch.library.opcheck(_store_latent.registered, (latent, rope, cache, slot_mapping), test_utils=test_utils)


def test_nothing_to_store(stores: Stores) -> None:
    cache, rows = torch.zeros(3, 4, 2, 8, device=DEVICE), torch.zeros(0, 2, 8, device=DEVICE)
    stores[0](rows, rows, cache, cache.clone(), torch.zeros(0, dtype=torch.int64, device=DEVICE))
