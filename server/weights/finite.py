"""Whether values in host memory are finite, by their bits."""

import numpy as np
import torch
from torch import Tensor

# as integers, without the sign: infinity and every NaN are at least this, every other value is less
_BITS = {
    torch.float32: (torch.int32, 0x7FFFFFFF, 0x7F800000),
    torch.float16: (torch.int16, 0x7FFF, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7FFF, 0x7F80),
}
ROOM_BYTES = 1 << 19  # few enough for the processor's cache, enough that other threads may run meanwhile


def flat(tensor: Tensor) -> Tensor:
    """The elements of one that lies in one piece. `view(-1)` keeps the stride of a single one, whatever that is."""
    return tensor.as_strided((tensor.numel(),), (1,))


def are_finite_on_host(tensor: Tensor, scratch: "np.ndarray[tuple[int], np.dtype[np.uint8]]") -> bool:
    """tensor: in one piece. scratch [ROOM_BYTES]. By numpy, on this thread alone: torch would make a copy, and wake the
    threads that compute."""
    if tensor.dtype not in _BITS:
        return bool(tensor.isfinite().all())
    as_integers, without_sign, infinite = _BITS[tensor.dtype]
    bits = flat(tensor).view(as_integers).numpy()
    room = scratch.view(bits.dtype)
    for begin in range(0, len(bits), len(room)):
        piece = bits[begin : begin + len(room)]
        magnitudes = np.bitwise_and(piece, without_sign, out=room[: len(piece)])
        if magnitudes.max() >= infinite:
            return False
    return True
