"""What tests of the lifecycle share: three adapters, and a lifecycle over them."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.adapter_files import esft, lora
from tests.support.adapters_alone import Adapters, adapters

Test = Callable[[Adapters], Awaitable[None]]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., None]:
    """Three adapters lie in a, b and c; `run(test)` gives the test a lifecycle over them."""
    lora(tmp_path / "a")
    lora(tmp_path / "b", lora_alpha=3)
    esft(tmp_path / "c", {1: [0]})

    def run(test: Test, **settings: Any) -> None:
        async def opened() -> None:
            async with adapters(tmp_path, **settings) as it:
                await test(it)

        asyncio.run(opened())

    return run
