"""Which implementation of an op computes: its compiled kernel or its reference."""

from torch import Tensor


def takes(tensor: Tensor) -> bool:
    """Whether kernels compute on tensors that live where this one does; references do elsewhere.

    A function rather than a constant, so that tests can send a whole engine through Triton's interpreter.
    """
    return tensor.is_cuda
