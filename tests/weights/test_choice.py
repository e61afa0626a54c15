"""Which arenas and copies a device gets, and what is said where it cannot have the best."""

import logging
import mmap

import pytest
import torch

from server.weights import choice, cuda_driver
from server.weights.arena import ArenaError, VirtualMemoryUnsupported
from server.weights.cuda_driver import CudaDriver
from server.weights.padded_arena import PaddedArenas
from server.weights.staging import HostCopy
from tests.support.cuda_fake_driver import FakeBindings, Result

CPU = torch.device("cpu")


def old_driver(name: str) -> FakeBindings:
    fake = FakeBindings()

    def missing(*_: object) -> None:
        raise RuntimeError(f'Function "{name}" not found')

    setattr(fake, name, missing)
    return fake


@pytest.mark.parametrize(
    ("bindings", "reason"),
    [
        (FakeBindings(has_virtual_memory=False), "no virtual memory management"),
        (old_driver("cuMemCreate"), 'cuMemCreate is missing from the driver: Function "cuMemCreate" not found'),
        (old_driver("cuInit"), "cuInit is missing from the driver"),
    ],
)
def test_a_device_without_virtual_memory_gets_padded_arenas(
    bindings: FakeBindings, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("server.weights.cuda_arena.load_driver", lambda ordinal: CudaDriver(bindings, ordinal))
    with caplog.at_level(logging.WARNING, "heddle"):
        assert isinstance(choice.choose_arenas(torch.device("cuda", 0)), PaddedArenas)
    assert reason in caplog.text and "max_experts_per_adapter" in caplog.text
    assert not bindings.reserved and not bindings.live


@pytest.mark.parametrize("call", ["cuMemAddressReserve", "cuMemCreate", "cuMemMap", "cuMemSetAccess"])
def test_a_device_that_refuses_what_it_reports_gets_padded_arenas(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bindings = FakeBindings()
    bindings.failures = {call: [Result.CUDA_ERROR_NOT_SUPPORTED]}
    monkeypatch.setattr("server.weights.cuda_arena.load_driver", lambda ordinal: CudaDriver(bindings, ordinal))
    assert isinstance(choice.choose_arenas(torch.device("cuda", 0)), PaddedArenas)
    assert not bindings.reserved and not bindings.live


def test_a_device_that_is_full_is_no_reason_for_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    bindings = FakeBindings(total_bytes=0)
    monkeypatch.setattr("server.weights.cuda_arena.load_driver", lambda ordinal: CudaDriver(bindings, ordinal))
    with pytest.raises(ArenaError, match="0 of 0 bytes free") as caught:
        choice.choose_arenas(torch.device("cuda", 0))
    assert not isinstance(caught.value, VirtualMemoryUnsupported)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings", None)
    with pytest.raises(VirtualMemoryUnsupported, match="cuda-bindings"):
        cuda_driver.load_driver(0)


def test_the_host_gets_its_own_pages() -> None:
    assert choice.choose_arenas(CPU).page_bytes == mmap.PAGESIZE
    assert isinstance(choice.choose_copier(CPU), HostCopy)
