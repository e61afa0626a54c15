"""A LoRA of a higher rank than decodes were captured for is served, and whoever registers it is told the cost."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from adapters_store.catalog import CatalogEntry
from adapters_store.parts import AdapterPackage, LowRank, TensorRef
from adapters_store.ref import AdapterRef
from server.api.adapters import register, warnings_for
from server.cli import _config, _parser
from server.config import EngineConfig
from server.errors import ConfigError


def entry(*ranks: int) -> CatalogEntry:
    parts = tuple(
        LowRank(f"{index}.q_proj", TensorRef("a", "a", (rank, 8), "F32"), TensorRef("a", "b", (8, rank), "F32"), 1.0)
        for index, rank in enumerate(ranks)
    )
    return CatalogEntry(
        AdapterRef("tall", "0" * 64, "lora"), AdapterPackage("lora", ".", "0" * 64, (), parts), "tall", 0
    )


def service(graph_rank: int | None) -> Any:
    """As far as registering goes."""
    client = SimpleNamespace(stats=SimpleNamespace(adapters=()), add_adapter=lambda ref, package: None)
    catalog = SimpleNamespace(base_names=("base",), add=lambda entry: True)
    return SimpleNamespace(info=SimpleNamespace(graph_rank=graph_rank), client=client, catalog=catalog)


@pytest.mark.parametrize(("ranks", "graph_rank"), [((8, 64), 64), ((65,), None), ((), 0)])
def test_nothing_is_said_where_nothing_is_lost(ranks: tuple[int, ...], graph_rank: int | None) -> None:
    assert warnings_for(entry(*ranks), service(graph_rank)) == []


def test_a_higher_rank_is_said_at_registration(caplog: pytest.LogCaptureFixture) -> None:
    (warning,) = warnings_for(entry(8, 128), service(64))
    assert "rank 128 is above 64" in warning and "--max-rank 128" in warning
    with caplog.at_level(logging.WARNING):
        register(entry(8, 128), service(64))
    assert "adapter tall" in caplog.text and warning in caplog.text


def test_the_rank_is_a_setting() -> None:
    assert _config(_parser().parse_args(["serve", ".", "--max-rank", "128"])).engine.max_rank == 128
    assert EngineConfig(".").max_rank == 64
    with pytest.raises(ConfigError, match="max_rank must be at least 0"):
        EngineConfig(".", max_rank=-1)
