"""What the tests of several ops share."""

import os
from collections.abc import Iterator

import pytest
import torch

from kernels import host


@pytest.fixture
def host_kernels() -> None:
    """For tests of the compiled kernels themselves."""
    if not host.takes_on(torch.device("cpu"), torch.float32):
        if os.environ.get("CI"):  # which has a compiler: to skip all of them would look like passing
            pytest.fail(host.status())
        pytest.skip(host.status())


@pytest.fixture(params=["reference", "host"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """What computes on the CPU: each test that asks for it runs with both."""
    if request.param == "host":
        request.getfixturevalue("host_kernels")
        yield "host"
        return
    with host.references_only():
        yield "reference"


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes of experts that the interpreter gets through, with more than one block in every direction."""
    from kernels.grouped_gemm import kernel as gemm_kernel
    from kernels.grouped_gemm.activation import kernel as activation_kernel
    from kernels.lora import kernel as lora_kernel

    sizes = {"": {(2, 4): gemm_kernel.Blocks(16, 64, 4, 2), (4, 4): gemm_kernel.Blocks(16, 16, 8, 2)}}
    monkeypatch.setattr(gemm_kernel, "GATE_UP", sizes)
    monkeypatch.setattr(gemm_kernel, "DOWN", sizes)
    monkeypatch.setattr(gemm_kernel, "_COMBINE_COLUMNS", 16)
    monkeypatch.setattr(activation_kernel, "_COLUMNS", 16)
    monkeypatch.setattr(lora_kernel, "_blocks", lambda *_: (16, 16, 4))
    monkeypatch.setattr(lora_kernel, "splits_of", lambda *_, **__: 2)
