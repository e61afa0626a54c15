"""The host's kernels as they are loaded: whose threads they use, and for which processors they can be built."""

import os
import re
from pathlib import Path

import pytest

from kernels.host import build
from tests.support.commands import run

pytestmark = pytest.mark.usefixtures("host_kernels")

THREADS = """
import ctypes, re
from pathlib import Path
import torch
from kernels import host
from kernels.rms_norm import rms_norm

def tasks():
    return len(list(Path("/proc/self/task").iterdir()))

x, weight = torch.randn(512, 4096), torch.ones(4096)
assert host.takes(x), host.status()
openmp = ctypes.CDLL(None)
torch.set_num_threads(1)
rms_norm(x, weight, 1e-6)
print("one", openmp.omp_get_max_threads(), tasks())
torch.set_num_threads(3)
rms_norm(x, weight, 1e-6)
print("three", openmp.omp_get_max_threads(), tasks())
x @ x.t()  # torch's own, on the same three
rms_norm(x, weight, 1e-6)
print("torch", openmp.omp_get_max_threads(), tasks())
mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
print(*(it for it in mapped if re.search("lib(gomp|omp|iomp)", it)))
"""


def test_there_is_one_openmp_runtime_and_it_is_torch_s() -> None:
    """One pool of threads, as large as torch.set_num_threads says."""
    done = run("-c", THREADS, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    one, three, torchs, runtimes = done.stdout.splitlines()
    before = int(one.split()[2])
    assert one.split()[1] == "1" and three.split()[1:] == ["3", str(before + 2)]
    assert torchs.split()[1:] == ["3", str(before + 2)]
    assert len(runtimes.split()) == 1, runtimes


VARIANTS = {"x86_64": ["x86-64", "x86-64-v3", "x86-64-v4", "nehalem", "haswell"], "aarch64": ["armv8-a"]}
INSIDE = """
import sys
import pytest
from kernels.host import build
build.NATIVE = ("-march=" + sys.argv[1],)
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""
OPS = ("paged_attention", "lora", "grouped_gemm", "expert_route", "rms_norm", "rope")


@pytest.mark.thorough
@pytest.mark.timeout(600)
@pytest.mark.parametrize("march", VARIANTS.get(os.uname().machine, []))
def test_kernels_for_other_processors(march: str, tmp_path: Path) -> None:
    """Every test of the host's kernels, with vectors of 4, 8 and 16 where this processor has them."""
    if march == "x86-64-v4" and "avx512f" not in build.processor()[1]:
        pytest.skip("this processor has no AVX-512")
    files = [f"tests/kernels/{op}/test_host.py" for op in OPS]
    done = run("-c", INSIDE, march, *files, XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout) and "skipped" not in done.stdout
