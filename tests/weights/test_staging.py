"""Copies through pinned buffers: order, pieces and dtypes, with streams that only keep a log."""

import pytest
import torch

from server.weights.staging import HostCopy, PinnedCopy
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


@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (400, 1000), (1_000_003,)])
def test_the_host_converts_a_piece_at_a_time(to: torch.dtype, shape: tuple[int, ...]) -> None:
    log: list[object] = []
    copy = HostCopy()
    for dtype in (torch.float32, torch.bfloat16):
        tensor = torch.randn(shape).to(dtype)
        source, place = Source(tensor, log), torch.full(shape, float("nan"), dtype=to)
        copy.put(source.read, source.num_bytes, dtype, place)
        assert torch.equal(place, tensor.to(to))
        block = torch.full((*shape, 2), float("nan"), dtype=to)  # not in one piece
        copy.put(source.read, source.num_bytes, dtype, block[..., 0])
        assert torch.equal(block[..., 0], tensor.to(to)) and block[..., 1].isnan().all()


def test_what_lasts_is_copied_from_where_it_lies() -> None:
    copy, cuda = pinned(64)
    values = torch.randn(100)
    raw, place = values.view(torch.uint8), torch.full((10, 10), float("nan"))
    cuda.log.clear()
    run = copy.begin()
    run.put_lasting(raw.split([3, 90, 307]), place)  # pieces that begin within an element
    assert run.are_finite([place])
    run.end()
    assert torch.equal(place.view(-1), values)
    assert [it[0] for it in cuda.log] == ["wait_stream", "copy", "copy", "record"]  # no buffer: nothing is waited for
    place[3, 3] = float("nan")
    assert not run.are_finite([place, values]) and run.are_finite([values, values[:0]])
