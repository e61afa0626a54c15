"""What tests of verification share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from adapters_store.rules import Rules
from adapters_store.verify import Job
from tests.support.adapter_files import BASE


@pytest.fixture
def job(tmp_path: Path) -> Callable[[str], Job]:
    rules = Rules(BASE, (tmp_path,))
    return lambda path: rules.job(path)
