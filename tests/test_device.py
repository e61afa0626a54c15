"""How a GPU's memory is shared out, and what is said where it does not suffice."""

import pytest
import torch

from server.config import EngineConfig
from server.device import (
    CPU,
    bytes_left,
    choose_device,
    choose_dtype,
    choose_slots,
    choose_tokens_per_step,
    host_cache_bytes,
    reserved_bytes,
)
from server.errors import ConfigError

GIB = 1 << 30
CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One with 80 GiB, of which 50 are free and torch holds 12, 2 of them unused."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 12 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10 * GIB)


def test_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert choose_device("auto") == choose_device("cpu") == CPU
    with pytest.raises(ConfigError, match="sees no GPU"):
        choose_device("cuda")
    assert choose_dtype("auto", CPU) == torch.float32 and choose_dtype("bfloat16", CPU) == torch.bfloat16


@pytest.mark.usefixtures("gpu")
def test_with_a_gpu() -> None:
    assert choose_device("auto") == choose_device("cuda") == CUDA and choose_device("cpu") == CPU
    assert choose_dtype("auto", CUDA) == torch.bfloat16 and choose_dtype("float32", CUDA) == torch.float32


@pytest.mark.usefixtures("gpu")
def test_amd_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(ConfigError, match="AMD"):
        choose_device("auto")


def test_the_token_budget_follows_the_device() -> None:
    assert choose_tokens_per_step(EngineConfig("."), CPU) == 512
    assert choose_tokens_per_step(EngineConfig("."), CUDA) == 2048
    assert choose_tokens_per_step(EngineConfig(".", max_running=4096), CUDA) == 4096
    assert choose_tokens_per_step(EngineConfig(".", tokens_per_step=300), CUDA) == 300


@pytest.mark.usefixtures("gpu")
def test_what_weights_and_activations_leave_is_for_kv_blocks_and_adapters() -> None:
    assert bytes_left(CUDA, 40 * GIB) == (50 + 2 - 40) * GIB - reserved_bytes(80 * GIB)
    with pytest.raises(ConfigError, match=rf"take {56 * GIB:,} bytes more, .* has {52 * GIB:,} of {80 * GIB:,} free"):
        bytes_left(CUDA, 56 * GIB)


def test_of_a_host_at_most_half_of_what_is_free_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, left in ((6 * GIB, 3 * GIB), (100 * GIB, 8 * GIB)):
        monkeypatch.setattr("server.device.available_bytes", lambda free=free: free)
        assert bytes_left(CPU, 1 << 60) == left


def test_a_host_cache_is_as_configured_or_an_eighth_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.device.available_bytes", lambda: 64 * GIB)
    assert [host_cache_bytes(EngineConfig("."), it) for it in (CPU, CUDA)] == [0, 8 * GIB]
    assert host_cache_bytes(EngineConfig(".", host_cache_bytes=0), CUDA) == 0
    assert host_cache_bytes(EngineConfig(".", host_cache_bytes=50 * GIB), CPU) == 50 * GIB


def test_adapters_lack_bytes_before_they_lack_slots() -> None:
    config = EngineConfig(".")
    assert choose_slots(config, 4 * GIB, 3 * GIB, is_shared=True) == 1024
    assert choose_slots(config, 60 * GIB, 30 * GIB, is_shared=True) == (16 << 40) // (60 * GIB)
    assert choose_slots(config, 1 << 20, 3 * GIB, is_shared=True) == 16
    assert choose_slots(config, 4 * GIB, 3 * GIB, is_shared=False) == 8
    assert choose_slots(EngineConfig(".", adapter_slots=3), 4 * GIB, 3 * GIB, is_shared=True) == 3
