"""Bytes at addresses that torch did not allocate."""

import weakref

import pytest
import torch

from server.weights import dlpack
from server.weights.dlpack import bytes_at

CPU = torch.device("cpu")


@pytest.mark.parametrize("num_bytes", [0, 1, 100])
def test_bytes_at_an_address(num_bytes: int) -> None:
    class Owner:
        pass

    memory = torch.arange(1024, dtype=torch.int64)
    owner = Owner()
    alive, num_alive = weakref.ref(owner), len(dlpack._alive)
    tensor = bytes_at(memory.data_ptr(), num_bytes, CPU, owner)
    del owner
    assert tensor.shape == (num_bytes,) and tensor.dtype is torch.uint8 and tensor.is_contiguous()
    if num_bytes:
        assert tensor.data_ptr() == memory.data_ptr()
        tensor[-1] = 5
        assert memory.view(torch.uint8)[num_bytes - 1] == 5
        view = tensor[-1:]
        del tensor
        assert alive() is not None and len(dlpack._alive) == num_alive + 1
        del view
    else:
        del tensor
    assert alive() is None and len(dlpack._alive) == num_alive
