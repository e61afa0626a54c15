"""Commands that nobody runs by hand often enough: every kernel compiled, as listed and as launched."""

import pytest

from tests.support.breadth import always
from tests.support.commands import run


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_every_configuration_compiles_without_a_spill() -> None:
    """For sm_80, sm_90 and gfx942; the committed table says what each needs."""
    done = run("-m", "benchmarks.aot")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("model_type", always(["llama", "gpt_oss", "deepseek_v2"], "deepseek_v2"))
def test_an_engine_of_real_width_compiles_as_it_is_launched(model_type: str) -> None:
    """Its whole warm-up, in bfloat16 for an H200 that is not there (tests/support/compile_only.py)."""
    done = run("-m", "tests.support.compile_only", model_type)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    wanted = ["step_rows_kernel", "_attention", "shrink_kernel", "lora_kernel", "_rms_norm", "_scan", "_choose",
              "copy_edited", "_of_part"]  # fmt: skip
    if model_type != "llama":
        wanted += ["route_kernel", "gate_up_kernel", "down_kernel", "combine_kernel"]
    assert all(f"'{kernel}'" in done.stdout for kernel in wanted), done.stdout


def test_the_table_of_compiled_kernels_says_what_spills() -> None:
    """In a process of its own: benchmarks.aot turns the interpreter off."""
    row = "aot.Compiled('sampling', 'fp32', 'sm_90', 128, 0, {spilled}, 16)"
    rows = f"[{row.format(spilled=0)}, {row.format(spilled=8)}]"
    done = run("-c", f"from benchmarks import aot; print(aot.as_table({rows})); print(aot.as_table({rows}[:1]))")
    first, *_, last = [line for line in done.stdout.splitlines() if line.startswith("Triton")]
    assert first.endswith("227 on sm_90. 1 of 2 spill or pass one:") and last.endswith(
        "None of 1 spills or passes one."
    )
    assert "- sampling fp32 on sm_90 spills 8 bytes a thread" in done.stdout.splitlines()


def test_each_triton_has_a_table_of_its_own() -> None:
    done = run("-c", "from benchmarks.aot import *; print(table_path(pinned_version()).name, table_path('3.6.0').name)")
    assert done.stdout.split()[-2:] == ["kernels_aot.md", "kernels_aot_3.6.md"]
