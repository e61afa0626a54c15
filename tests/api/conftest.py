"""One server for the modules that only talk to it; a module that needs another has fixtures of the same names.

For the session: files of other packages run in between, and a start takes seconds.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest

from adapters_store.rules import Rules
from tests.support.engine_harness import Engine
from tests.support.live_server import LiveServer, write_tokenizer
from tests.support.served import PROMPT, VOCAB, tiny
from tests.support.tiny_adapters import merge, save_esft, save_lora
from tests.support.tiny_models import reference, save_model


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    write_tokenizer(save_model(root / "tiny", "qwen3_moe", vocab_size=VOCAB))
    model = tiny()
    save_lora(root / "adapters" / "lora", model, 1, ("q_proj", "v_proj"))
    save_esft(root / "adapters" / "esft", model, 2, {1: [2, 0], 3: [5]})
    save_lora(root / "more" / "late", model, 3, ("o_proj",))
    save_lora(root / "more" / "other", model, 4, ("o_proj",))
    (root / "adapters" / "broken").mkdir()
    return root


@pytest.fixture(scope="session")
def server(root: Path) -> Iterator[LiveServer]:
    server = LiveServer(str(root / "tiny"), "--adapters", str(root / "adapters"), "--adapter-root", str(root / "more"),
                        log=root / "log").wait_ready()  # fmt: skip
    yield server
    assert server.stop() == 0, server.output()


@pytest.fixture(scope="session")
def http(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def expected(root: Path) -> Callable[[str, int], list[int]]:
    """Greedy tokens of PROMPT through each merged model."""
    rules = Rules(Engine(tiny()).assembly.info.base, (root / "adapters", root / "more"))

    def tokens(name: str, count: int) -> list[int]:
        model = tiny()
        if name != "tiny":
            folder = "more" if name in ("late", "other") else "adapters"
            model = merge(model, rules.read(name, str(root / folder / name)))
        return reference(model, PROMPT, count)

    return tokens
