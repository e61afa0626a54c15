"""Which implementation of an op computes: its compiled kernel or its reference."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

# every op with a kernel, in the order of a layer
OPS = ("step_rows", "expert_route", "expert_tiles", "grouped_gemm", "lora", "gated", "paged_attention", "store_kv",
       "latent_prep", "rope_store", "rms_norm", "rope", "sampling", "logprobs")  # fmt: skip

_everywhere = ContextVar("everywhere", default=False)


def takes(tensor: Tensor) -> bool:
    """Whether kernels compute on tensors that live where this one does. Where they do not, references do."""
    return tensor.is_cuda or _everywhere.get()


def takes_on(device: torch.device) -> bool:
    """Whether kernels compute on the tensors of a device."""
    return device.type == "cuda" or _everywhere.get()


@contextmanager
def everywhere() -> Iterator[None]:
    """Send a CPU's tensors through kernels too: Triton's interpreter, or a driver that only compiles."""
    token = _everywhere.set(True)
    try:
        yield
    finally:
        _everywhere.reset(token)
