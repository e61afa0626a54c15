"""The list of configurations is what an engine launches: integer types and alignments included."""

import pytest

from tests.support.commands import run


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_store_kv_is_listed_as_it_is_launched() -> None:
    """Grouped-query attention's caches and MLA's, with the indices that the engine passes."""
    done = run("-m", "tests.support.specialisations", "llama", "deepseek_v2", "--ops", "store_kv", "--narrow")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
