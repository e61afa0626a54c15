"""How a GPU's memory is shared out, and what is said where it does not suffice."""

import pytest
import torch

from server.config import EngineConfig
from server.device import (
    CPU,
    choose_device,
    choose_dtype,
    choose_tokens_per_step,
    kv_bytes,
    num_kv_blocks,
    require_room,
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
def test_weights_that_do_not_fit_are_refused_with_the_numbers() -> None:
    require_room(CUDA, 40 * GIB, 10 * GIB)
    require_room(CPU, 1 << 60, 1 << 60)
    with pytest.raises(
        ConfigError, match=rf"take {56 * GIB:,} bytes, adapters {4 * GIB:,} .* has {60 * GIB:,} of {80 * GIB:,}"
    ):
        require_room(CUDA, 56 * GIB, 4 * GIB)


@pytest.mark.usefixtures("gpu")
def test_the_kv_cache_takes_what_is_left() -> None:
    config = EngineConfig(".", max_running=10_000)
    left = (50 + 2 - 4) * GIB - reserved_bytes(80 * GIB)
    assert num_kv_blocks(config, 1 << 20, 1 << 20, CUDA, 4 * GIB) == left >> 20
    # but no more than all running requests can fill
    assert num_kv_blocks(EngineConfig(".", max_running=2), 160, 1 << 20, CUDA, 4 * GIB) == 20
    with pytest.raises(ConfigError, match=r"less than one block .* adapters have"):
        num_kv_blocks(config, 1 << 20, 1 << 20, CUDA, 52 * GIB)


def test_a_kv_cache_that_does_not_fit_is_refused_with_the_numbers() -> None:
    assert kv_bytes(5 * GIB, 20 * GIB, 80 * GIB, 4 * GIB) == 5 * GIB
    with pytest.raises(ConfigError, match=rf"{16 * GIB:,} does not fit: {20 * GIB:,} .* {80 * GIB:,} .* {4 * GIB:,}"):
        kv_bytes(16 * GIB, 20 * GIB, 80 * GIB, 4 * GIB)
