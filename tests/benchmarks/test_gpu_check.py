"""The GPU check runs wherever it may be started: every section through its command line, at toy sizes, in the
interpreter, and where nothing is installed but what a PyTorch image and msgspec bring."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from benchmarks.gpu import models, sections, shapes
from benchmarks.gpu.measure import Bench, Scale
from benchmarks.gpu.processes import run_limited
from benchmarks.gpu.report import ENDED, RowFile, failures, write_summary
from benchmarks.gpu.serving import dense_numbers
from kernels.compiled import OPS
from tests.support.breadth import always

ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30
# what we need elsewhere, and neither torch, triton, transformers nor msgspec brings
ABSENT = ("fastapi", "starlette", "uvicorn", "pydantic", "zmq", "prometheus_client", "rich", "openai", "peft",
          "hypothesis", "pytest", "psutil")  # fmt: skip
BLOCKER = f"""
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.partition(".")[0] in {ABSENT!r} else find_spec(name, *rest)
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run it at full size")
@pytest.mark.parametrize("names", always([["kernels", "stress", "lora"], [*sections.BY_NAME]],
                                         ["kernels", "stress", "lora"]), ids=" ".join)  # fmt: skip
def test_sections_run_at_toy_size_without_what_an_image_lacks(tmp_path: Path, names: list[str]) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "benchmarks/gpu_check.py", "--toy", "--out", str(tmp_path / "out"), "--section", *names]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    summary = (tmp_path / "out" / "summary.md").read_text()
    skipped = set()
    for name in names:
        rows = RowFile(tmp_path / "out", name).read()
        assert failures(rows) == [] and f"| {name} | ok |" in summary
        assert rows[0]["facts"]["torch"] == torch.__version__
        if any("GPU" in row.get("skipped", "") for row in rows):
            skipped.add(name)
        assert all("GPU" in row.get("skipped", "GPU") for row in rows), name
    # the last two: only the table of one replay
    assert skipped == {"self-test", "memcheck", "attention", "esft", "lora"}.intersection(names)


def test_the_blocked_are_blocked(tmp_path: Path) -> None:
    """Else the test above proves nothing."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", "import msgspec, zmq"], env=environment, capture_output=True,
                          text=True)  # fmt: skip
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'zmq'"


def test_sections_cover_every_op_and_are_listed() -> None:
    assert sections.OPS == OPS
    listed = subprocess.run([sys.executable, "benchmarks/gpu_check.py", "--list"], cwd=ROOT, capture_output=True,
                            text=True, check=True).stdout  # fmt: skip
    assert [line.split()[0] for line in listed.splitlines()] == list(sections.BY_NAME)


def test_the_order_of_runs_names_every_section_once_and_no_command_passes_ten_minutes() -> None:
    told = (ROOT / "benchmarks" / "gpu" / "README.md").read_text()
    commands = [line.partition("--section ")[2].partition(" --out")[0].split() for line in told.splitlines()
                if line.startswith("python benchmarks/gpu_check.py --section")]  # fmt: skip
    assert sorted(name for names in commands for name in names) == sorted(sections.BY_NAME)
    assert all(sum(sections.BY_NAME[name].limit_s for name in names) <= 600 for names in commands)


# -- what is left of a run that was cut ---


def test_a_process_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    child = f"import time; time.sleep(1.5); open({str(tmp_path / 'late')!r}, 'w')"
    hangs = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    commands = [[sys.executable, "-c", hangs], [sys.executable, "-c", "print('well')"]]
    start = time.monotonic()
    assert run_limited(commands, 1.0) == ["it did not end in 1 s", "well"]
    assert time.monotonic() - start < 30
    time.sleep(1.0)
    assert not (tmp_path / "late").exists()


def test_a_crash_is_named() -> None:
    crash = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    commands = [[sys.executable, "-c", crash], [sys.executable, "-c", "raise SystemExit(3)"]]
    assert run_limited(commands, 20) == ["it was ended by SIGSEGV", "its exit status was 3"]


def test_rows_that_came_before_a_cut_are_kept_and_the_section_has_failed(tmp_path: Path) -> None:
    file = RowFile(tmp_path, "stress")
    file.begin({"device": "none", "date": "today"})
    file.append({"op": "lora", "different": 0, "ok": True})
    with file.path.open("a") as raw:
        raw.write('{"op": "route", "differ')  # killed while it wrote
    assert failures(file.read()) == ["it has not ended"]
    summary = write_summary(tmp_path).read_text()
    assert "| stress | FAILED (1) |" in summary and "| lora | 0 | True |" in summary


@pytest.mark.parametrize(
    ("rows", "wrong"),
    [
        ([{"case": "a", "us": 1.0}], 0),
        ([], 1),  # nothing measured
        ([{"case": "a", "ok": False}], 1),
        ([{"case": "a", "failed": "ValueError: b"}, {"case": "c", "ok": True}], 1),
        ([{"case": "a", "skipped": "no GPU"}], 0),
    ],
)
def test_what_counts_as_a_failure(rows: list[dict[str, object]], wrong: int, tmp_path: Path) -> None:
    file = RowFile(tmp_path, "ops")
    file.begin({})
    for row in [*rows, {ENDED: "well", "seconds": 1.0}]:
        file.append(row)
    assert len(failures(file.read())) == wrong


def test_figures_that_are_not_finite_are_written_as_text(tmp_path: Path) -> None:
    file = RowFile(tmp_path, "ops")
    file.begin({})
    file.append({"us": float("inf"), "ms": 1.5})
    assert json.loads(file.path.read_text().splitlines()[1]) == {"us": "inf", "ms": 1.5}


# -- sizes ---


def test_the_floor_counts_every_weight_that_a_step_reads() -> None:
    """Of toy sizes, by hand: hidden 32, vocabulary 97, the head apart from the embedding."""
    dense = {}
    for name, (model_type, _, toy) in shapes.MODELS.items():
        dense[name] = dense_numbers(AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**toy)))
    head, norms = 97 * 32 + 32, 2 * 32
    assert dense["Llama-3.1-8B"] == 32 * (2 * 32 + 2 * 16 + 3 * 40) + norms + head
    attention = 32 * (2 * 16 + 24 + 8 + 16) + 24 + 2 * 16 * 24  # queries, latent with its rope, out; norm, absorbed
    assert dense["DeepSeek-V2-Lite"] == 2 * (attention + norms) + 32 * (3 * 40 + 3 * 24 + 8) + head


@pytest.mark.parametrize(("total", "layers"), [(140, 27), (79, 20)], ids=["H200", "H100"])
def test_models_are_cut_to_the_free_memory(total: int, layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (total * GIB - GIB // 2, total * GIB))
    bench = Bench(Scale(torch.device("cpu"), is_toy=False))
    tuned, expert_bytes = 6, 3 * 2048 * 1408 * 2
    got, adapter_bytes = models.esft_sizes(bench, 266_240, tuned)
    assert got == layers
    # padded memory takes a full slot of each layer for every adapter: the budget must hold that too
    assert adapter_bytes >= models.ESFT_ADAPTERS * tuned * expert_bytes * (layers - 1)
    weights = 2 * 102400 * 2048 * 2 + layers * 66 * expert_bytes
    assert weights + adapter_bytes + 266_240 * 576 * 2 * layers < (total - 4) * GIB


def test_a_device_that_is_too_small_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (16 * GIB, 24 * GIB))
    with pytest.raises(RuntimeError, match=rf"{16 * GIB:,} of {24 * GIB:,} bytes are free"):
        models.esft_sizes(Bench(Scale(torch.device("cpu"), is_toy=False)), 266_240, 6)


# -- goals ---


def test_goals_stand_beside_what_was_measured(tmp_path: Path) -> None:
    def decode(name: str, batch: int, device: float, cost: float = 0.0) -> dict[str, object]:
        return {"decode": name, "batch": batch, "device ms": device, "floor ms": 4.0, "cost beyond floor": cost,
                "tokens/s": batch / device}  # fmt: skip

    rows = {
        "lora": [decode("0 LoRA", 32, 5.0), decode("8 LoRA", 32, 5.5), decode("base, 32 resident", 32, 5.02)],
        "esft": [decode("0 ESFT", 32, 5.6), decode("20 ESFT", 8, 6.0, 0.01), decode("20 ESFT", 32, 9.0, 0.05)],
    }
    for section, figures in rows.items():
        file = RowFile(tmp_path, section)
        file.begin({})
        for row in [*figures, {ENDED: "well", "seconds": 1.0}]:
            file.append(row)
    summary = write_summary(tmp_path).read_text()
    assert "| 8 LoRA of rank 16: tokens a second of the base's | >= 95% | 90.9% | batch 32 | MISSED |" in summary
    assert "few picks on tuned experts | <= 4% | 5.0% | batch 32 | MISSED |" in summary
    assert "32 LoRA on the device: slower by | <= 1% | 0.4% | base, 32 resident | met |" in summary
    assert "| Llama-3.1-8B decode, device over floor | <= 1.35 | 1.25 | batch 32 | met |" in summary
    assert "| attention at decode, of copy bandwidth | >= 80% |  |  | not measured |" in summary
