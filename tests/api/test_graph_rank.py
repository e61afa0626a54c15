"""The highest rank that decodes are captured for is a setting."""

import pytest

from server.cli import parser
from server.commands.serve import config_of
from server.config import EngineConfig
from server.errors import ConfigError


def test_the_rank_is_a_setting() -> None:
    assert config_of(parser().parse_args(["serve", ".", "--max-rank", "128"])).engine.max_rank == 128
    assert EngineConfig(".").max_rank == 64
    with pytest.raises(ConfigError, match="max_rank must be at least 0"):
        EngineConfig(".", max_rank=-1)
