"""What a server asks of a real GPU's virtual memory before it serves from it."""

import pytest
import torch

from server.weights.arena import VirtualMemoryUnsupported
from server.weights.cuda_driver import load_driver


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_real_device() -> None:
    from benchmarks.gpu.self_test import self_test

    try:
        load_driver(0)
    except VirtualMemoryUnsupported as error:
        pytest.skip(str(error))
    figures = self_test()
    assert figures["page_bytes"] >= 1 << 16
