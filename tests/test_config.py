"""Settings: what may be set, and that what may not is said with its name and value."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from server.config import EngineConfig, ServerConfig
from server.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"threads": -1}, "threads must be at least 0, not -1"),
        ({"max_model_len": -1}, "max_model_len must be at least 0"),
        ({"kv_cache_bytes": -1}, "kv_cache_bytes must be at least 0"),
        ({"max_experts_per_adapter": -1}, "max_experts_per_adapter must be at least 0"),
        ({"adapter_bytes": 65_535}, "adapter_bytes must be at least 65536, or 0, not 65535"),
        ({"memory_budget": -1}, "memory_budget must be at least 0"),
        ({"kv_reserve": -1}, "kv_reserve must be at least 0"),
        ({"host_cache_bytes": -2}, "host_cache_bytes must be at least -1"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"max_running": 0}, "max_running must be at least 1"),
        ({"max_waiting": 0}, "max_waiting must be at least 1"),
        ({"adapter_slots": -1}, "adapter_slots must be at least 0"),
        ({"max_skips": 0}, "max_skips must be at least 1"),
        ({"tokens_per_step": 127}, r"tokens_per_step \(127\) must be at least max_running \(128\)"),
        ({"tokens_per_step": -1}, "tokens_per_step must be at least 0"),
    ],
)
def test_what_no_engine_could_be_built_of_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        EngineConfig(".", **settings)


def test_the_least_of_everything_is_taken() -> None:
    least = {"threads": 0, "adapter_bytes": 65_536, "block_size": 1, "max_running": 1, "max_waiting": 1,
             "adapter_slots": 1, "max_skips": 1, "tokens_per_step": 1}  # fmt: skip
    assert EngineConfig(".", **least).tokens_per_step == 1  # type: ignore[arg-type]
    assert EngineConfig(".", tokens_per_step=0).tokens_per_step == 0  # chosen by the device


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"port": 65_536}, "port 65536 is not between 0 and 65535"),
        ({"port": -1}, "port -1 is not"),
        ({"max_request_tokens": -1}, "max_request_tokens must be at least 0"),
        ({"drain_s": -0.1}, "drain_s must be at least 0"),
        ({"max_body_bytes": 0}, "max_body_bytes must be at least 1"),
        ({"max_sequences": 0}, "max_sequences must be at least 1"),
        ({"max_connections": 0}, "max_connections must be at least 1"),
        ({"header_timeout_s": 0}, "header_timeout_s must be more than 0 seconds, not 0"),
        ({"write_timeout_s": float("nan")}, "write_timeout_s must be more than 0 seconds, not nan"),
        ({"verify_timeout_s": 0}, "verify_timeout_s must be above 0 and below 86400, not 0"),
        ({"verify_timeout_s": 86_400}, "below 86400, not 86400"),
        ({"adapters_dir": "/nowhere"}, "the adapter directory '/nowhere' does not exist"),
        ({"adapter_roots": (".", "/nowhere")}, "the adapter root '/nowhere' does not exist"),
        ({"engine": EngineConfig("/nowhere")}, "the model directory '/nowhere' does not exist"),
    ],
)
def test_what_no_server_could_be_started_with_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ServerConfig(**{"engine": EngineConfig(".")} | settings)


def test_an_unknown_setting_is_refused_where_it_arrives_as_a_message() -> None:
    message = msgspec.to_builtins(EngineConfig("."))
    assert msgspec.convert(message, EngineConfig) == EngineConfig(".")
    with pytest.raises(msgspec.ValidationError, match="max_runing"):
        msgspec.convert(message | {"max_runing": 1}, EngineConfig)


def test_the_base_is_called_by_its_directory_unless_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "Model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "Model")
    for place in ("Model", "Model/", "link", "Model/../Model"):
        assert ServerConfig(EngineConfig(f"{tmp_path}/{place}")).base_name == "Model"
    assert ServerConfig(EngineConfig(str(tmp_path)), model_name="mine").base_name == "mine"


def test_the_adapter_directory_is_the_first_root(tmp_path: Path) -> None:
    engine, one, two = EngineConfig("."), str(tmp_path), "."
    assert ServerConfig(engine).roots == ()
    assert ServerConfig(engine, adapters_dir=one, adapter_roots=(two,)).roots == (tmp_path, Path("."))
    assert ServerConfig(engine, adapter_roots=(two, one)).roots == (Path("."), tmp_path)
