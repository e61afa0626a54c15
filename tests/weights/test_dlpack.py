"""Tensors at addresses that torch did not allocate."""

import weakref

import pytest
import torch

from server.weights import dlpack
from server.weights.dlpack import tensor_at

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.uint8])
@pytest.mark.parametrize("shape", [(), (5,), (3, 1, 7), (0, 4), (2, 0, 3)])
def test_a_tensor_at_an_address(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    class Owner:
        pass

    memory = torch.arange(1024, dtype=torch.int64)
    owner = Owner()
    alive, num_alive = weakref.ref(owner), len(dlpack._alive)
    tensor = tensor_at(memory.data_ptr(), shape, dtype, CPU, owner)
    del owner
    assert tensor.shape == shape and tensor.dtype is dtype and tensor.is_contiguous()
    if tensor.numel():
        assert tensor.data_ptr() == memory.data_ptr()
        tensor.view(-1)[-1] = 5
        count = tensor.numel()
        assert memory.view(torch.uint8)[: count * dtype.itemsize].view(dtype)[-1] == 5
        copy = tensor.view(-1)[:1]
        del tensor
        assert alive() is not None and len(dlpack._alive) == num_alive + 1
        del copy
    else:
        del tensor
    assert alive() is None and len(dlpack._alive) == num_alive
