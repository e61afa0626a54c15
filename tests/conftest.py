import os

# before torch is imported anywhere: tests never reach for a hub, and tiny operations are far faster on one thread
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import atexit
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from tests.support.thirds import THIRD

# without a GPU kernels run in Triton's interpreter; its decorator decides when a kernel's module is imported
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# servers keep registered adapters among the user's data
os.environ["XDG_DATA_HOME"] = tempfile.mkdtemp(prefix="heddle-test-data-")
atexit.register(shutil.rmtree, os.environ["XDG_DATA_HOME"], True)

# and times of products in their cache, where those of a machine that is busy with tests must not end up
_cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "heddle"
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="heddle-test-cache-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], True)
# compiled kernels are kept beyond the tests: their names say what they were made from
os.mkdir(f"{os.environ['XDG_CACHE_HOME']}/heddle", mode=0o700)
with suppress(OSError):
    (_cached / "kernels").mkdir(mode=0o700, parents=True, exist_ok=True)
    os.symlink(_cached / "kernels", f"{os.environ['XDG_CACHE_HOME']}/heddle/kernels")

# the same examples in every CI run: what a new one finds is for whoever runs them by hand, not for somebody's merge
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_report_header() -> str:
    return f"of what takes turns, third {THIRD} of 0 to 2 (HEDDLE_THIRD)"


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What torch.empty hands out reads as NaN, or as an index far outside: what is not written shows."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, Tensor.new_empty

    def poison(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return tensor.fill_(math.nan)
        return tensor.fill_(1 << 30) if tensor.dtype in (torch.int32, torch.int64) else tensor

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *args, **kwargs: poison(new_empty(self, *args, **kwargs)))
    torch.manual_seed(0)
    yield
