"""`reasoning_effort` in chat: over a socket, with templates that read it, and others."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from server.api.texts.adapter_texts import AdapterTexts
from server.api.texts.text import Text
from tests.support.scripted_server import TEMPLATE, ScriptedServer

ASKED: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Well?"}], "max_tokens": 20}
PLAIN = "{% for it in messages %}{{ it.role }}: {{ it.content }}{% endfor %}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedServer]:
    server = ScriptedServer(tmp_path_factory.mktemp("scripted"))
    with server.running():
        yield server


@pytest.mark.parametrize(
    ("template", "added"),
    [
        (TEMPLATE + "{% if enable_thinking is defined %}thinks: {{ enable_thinking }}{% endif %}", "thinks: False"),
        (TEMPLATE + "{{ reasoning_effort }}", "none"),
        (TEMPLATE + "{{ reasoning_effort }}{{ enable_thinking }}", "none"),
        (PLAIN, ""),
        (TEMPLATE, None),
    ],
)
def test_no_effort_is_no_reasoning(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, template: str, added: str | None
) -> None:
    (server.root / "model" / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    monkeypatch.setattr(server.service, "texts", AdapterTexts(Text.load(server.root / "model")))
    server.says("Warm.")
    url = f"{server.url}/v1/chat/completions"
    plain, none = (httpx.post(url, json=ASKED | it, timeout=20) for it in ({}, {"reasoning_effort": "none"}))
    if added is None:
        error = none.json()["error"]
        assert (none.status_code, error["param"]) == (400, "reasoning_effort") and "always has" in error["message"]
        return
    counts = [it.json()["usage"]["prompt_tokens"] for it in (plain, none)]
    assert counts[1] - counts[0] == len(added)
