"""What becomes of a verification that the server itself could not do."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adapters_store.catalog import Catalog
from adapters_store.verifier import VerifierBusy, VerifierClosed
from adapters_store.verify import Job
from server.api.adapters import verified
from server.errors import HeddleError, Overloaded, ShuttingDown
from tests.support.adapter_files import BASE


@pytest.mark.parametrize(("raised", "told"), [(VerifierBusy, Overloaded), (VerifierClosed, ShuttingDown)])
def test_over_http_what_is_the_servers_own_lack_is_a_503(
    tmp_path: Path, raised: type[Exception], told: type[HeddleError]
) -> None:
    class Refusing:
        async def verify(self, job: Job) -> None:
            raise raised

    service: Any = SimpleNamespace(catalog=Catalog("base", BASE, (tmp_path,)), verifier=Refusing())
    with pytest.raises(told) as error:
        asyncio.run(verified("x", "a", service))
    assert error.value.status == 503
