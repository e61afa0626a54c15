"""The lists of configurations are what an engine launches: types, alignments and integers that are 1 included."""

import pytest

from tests.support.commands import run


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "arguments",
    [
        "llama deepseek_v2 gpt_oss --narrow --ops step_rows expert_route lora paged_attention latent_prep rope_store "
        "sampling logprobs",
        pytest.param("deepseek_v2 --ops expert_tiles grouped_gemm lora rms_norm", marks=pytest.mark.thorough),
    ],
)
def test_kernels_are_listed_as_they_are_launched(arguments: str) -> None:
    """Grouped-query attention, MLA and both kinds of experts; at full width where the list has the width."""
    done = run("-m", "tests.support.specialisations", *arguments.split())
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
