"""Copies through pinned buffers: order, pieces and dtypes, with streams that only keep a log."""

import pytest
import torch

from server.weights.staging import PinnedCopy
from tests.support.cuda_fake_driver import FakeCuda

CPU = torch.device("cpu")


class Source:
    """A tensor's bytes, with each read in the log."""

    def __init__(self, tensor: torch.Tensor, log: list[object]) -> None:
        self.num_bytes, self.dtype, self._log = tensor.nbytes, tensor.dtype, log
        self._raw = bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())

    def read(self, into: memoryview, offset: int) -> None:
        self._log.append(("read", offset, len(into)))
        into[:] = self._raw[offset : offset + len(into)]


def pinned(buffer_bytes: int) -> tuple[PinnedCopy, FakeCuda]:
    cuda = FakeCuda()
    buffers = [torch.empty(buffer_bytes, dtype=torch.uint8) for _ in range(2)]
    return PinnedCopy(buffers, torch.empty(buffer_bytes, dtype=torch.uint8), CPU, cuda), cuda


def test_buffers_are_filled_again_only_after_the_copies_out_of_them() -> None:
    copy, cuda = pinned(256)
    source = Source(torch.randn(150), cuda.log)  # 600 bytes: two buffers and a bit
    place = torch.empty(150)
    cuda.is_busy = True
    run = copy.begin()
    run.put(source.read, 600, torch.float32, place)
    run.end()
    assert cuda.log == [
        ("wait_stream", "copy", "compute"),  # what is computing may still read what was in this place
        ("read", 0, 256),
        ("copy", "copy"),
        ("record", 1, "copy"),  # the first buffer's
        ("synchronize", 2),  # the second's: never recorded, so over
        ("read", 256, 256),
        ("copy", "copy"),
        ("record", 2, "copy"),
        ("synchronize", 1),
        ("read", 512, 88),
        ("copy", "copy"),
        ("record", 3, "copy"),
    ]
    assert not run.is_complete()
    run.join()
    assert cuda.log[-1] == ("wait_event", "compute", 3)
    assert place.view(torch.uint8).numpy().tobytes() == source._raw


@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16, torch.float16])
def test_pieces_and_dtypes(to: torch.dtype) -> None:
    """Tensors smaller and larger than a buffer, one after another; converted where the place is of another dtype."""
    copy, cuda = pinned(192)
    generator = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in ((1,), (3, 5), (7, 31), (48,), (2, 48), (96,)):
            tensor = torch.randn(shape, generator=generator).to(dtype)
            source, place = Source(tensor, cuda.log), torch.full(shape, float("nan"), dtype=to)
            copy._scratch.zero_()
            run = copy.begin()
            run.put(source.read, source.num_bytes, dtype, place)
            run.end()
            assert torch.equal(place, tensor.to(to)) and run.is_complete()
            assert copy._scratch.any() == (dtype is not to)  # converted on the device, or else straight to the place
