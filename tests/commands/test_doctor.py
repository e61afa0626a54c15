"""`heddle doctor`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.linear import FORMS
from server import diagnosis
from server.cpu import Cpu, this_cpu
from server.model.linear_forms import ROW_CLASSES
from server.model.linear_times import LinearTimes, Shape, cache_directory
from tests.support.commands import ROOT

Heddle = Callable[..., Any]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")  # which the command sets, for its own process
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # of other tests too


def test_what_the_machine_has(heddle: Heddle, tmp_path: Path) -> None:
    done = heddle("doctor")
    assert (done.status, done.err) == (0, "")
    for said in (f"torch {torch.__version__}", this_cpu().model, "onednn-packed", str(tmp_path / "cache" / "heddle")):
        assert said in done.out
    assert "Microseconds" not in done.out


def test_times_that_were_measured_are_shown_with_the_choice(heddle: Heddle) -> None:
    kept = LinearTimes(cache_directory(), 2)
    kept.put(Shape(300, 256, torch.float32, True), {"torch": [2e-3, 4e-3], "onednn-packed": [1e-3, 1e-3]})
    kept.save()
    done = heddle("doctor", "--threads", 2)
    first, second = [line for line in done.out.splitlines() if line.startswith("256 -> 300 float32 with bias")]
    assert first.split()[-4:] == ["torch", "2,000", "4,000", "onednn-packed"] and second.split()[-2:] == ["1,000"] * 2
    assert "Microseconds" not in heddle("doctor", "--threads", 1).out  # other threads, other times


def test_a_base_is_loaded_and_measured(heddle: Heddle) -> None:
    done = heddle("doctor", ROOT / "demo" / "base", "--threads", 1)
    assert done.status == 0 and "deepseek_v2, 3.8 million parameters: served" in done.out
    assert "192 -> 2048" in done.out and "the embedding's too" in done.out
    head = diagnosis.times(1)
    assert all(row.form in {form.name for form in FORMS} and len(row.times) == len(ROW_CLASSES) for row in head)


def test_a_base_that_is_not_served(heddle: Heddle, tmp_path: Path) -> None:
    done = heddle("doctor", tmp_path)
    assert done.status == 78 and "holds no config.json" in done.err and "torch" in done.out
    assert heddle("doctor", "--threads", -1).status == 78


def test_what_is_lacking_comes_with_a_remedy(heddle: Heddle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()  # no directory
    monkeypatch.setattr(diagnosis, "this_cpu", lambda: Cpu("An old one", ("fma",)))
    monkeypatch.setattr(diagnosis, "why_not", lambda form, dtype: None if form.name == "torch" else "no such op")
    done = heddle("doctor", "--threads", 1000)
    assert done.status == 0
    _, _, remedies = done.out.partition("To mend:")
    for words in ("XDG_CACHE_HOME", "newer CPU", "--threads"):
        assert words in remedies
    assert "no such op" in done.out and "no such op" not in remedies  # nobody can mend that
    assert done.out.count("\n!") == remedies.count("\n  ") and "float32, the default, is faster" in done.out


def test_the_cpu_is_read_as_linux_writes_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr("server.cpu._INFO", info)
    assert this_cpu() == Cpu("", ())
    info.write_text("processor\t: 0\nFeatures\t: fp asimd bf16 sve\nCPU implementer\t: 0x41\n\n")
    assert this_cpu() == Cpu("0x41", ("asimd", "sve", "bf16")) and this_cpu().multiplies_bfloat16
    info.write_text("cpu family\t: 6\nmodel\t\t: 143\nmodel name\t: Xeon\nstepping\t: 8\nflags\t: avx2 amx_bf16 mmx\n")
    assert this_cpu() == Cpu("Xeon (6/143/8)", ("avx2", "amx_bf16"))
