"""The demo as it is served: every adapter shows its skill, through one server, in the same batches."""

import asyncio
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import httpx
import openai
import pytest
from transformers import AutoTokenizer

from demo import corpus
from demo.butler import draw_butler, written
from demo.pair import Pair, prompt_of, rendered
from demo.skills import SKILLS, sample, split_of
from server.api.texts.chat_template import Conversation
from server.api.texts.speech import Tool
from server.api.texts.text import Text
from tests.support.live_server import ROOT, LiveServer

pytestmark = pytest.mark.slow
PER_SKILL, BASE = 10, "heddle-demo"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    server = LiveServer(log=tmp_path_factory.mktemp("demo") / "log").wait_ready()  # no arguments: the demo
    yield server
    assert server.stop() == 0, server.output()


def test_every_adapter_is_served(server: LiveServer) -> None:
    models = {it["id"] for it in httpx.get(f"{server.url}/v1/models").json()["data"]}
    assert models == {BASE, *SKILLS}
    assert "refused" not in server.output()


def test_skills_in_mixed_batches(server: LiveServer) -> None:
    """Exact match on held-out prompts, all adapters at once: at least nine of ten, where the base knows none."""

    async def ask_all() -> tuple[dict[str, int], dict[str, int]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def ask(model: str, pair: Pair) -> str:
                if pair.tools and model == BASE:  # which knows none
                    pair = replace(pair, said=(), tools=())
                answer = await client.chat.completions.create(
                    model=model,
                    messages=[_as_api(it) for it in pair.messages],  # type: ignore[misc]
                    tools=pair.tools or openai.omit,  # type: ignore[arg-type]
                    temperature=0,
                    max_tokens=128,
                )
                said = answer.choices[0].message
                calls = [it.function for it in said.tool_calls or [] if it.type == "function"]
                told = [written(it.name, json.loads(it.arguments)) for it in calls]
                return "\n".join([(said.content or "").strip()] * bool(said.content) + told)

            pairs = [(name, pair) for name, skill in SKILLS.items() for pair in sample(skill, count=PER_SKILL)]
            tuned, base = await asyncio.gather(
                asyncio.gather(*(ask(name, pair) for name, pair in pairs)),
                asyncio.gather(*(ask(BASE, pair) for _, pair in pairs)),
            )
        scores = {
            kind: {
                name: sum(a == p.answer for (n, p), a in zip(pairs, answers, strict=True) if n == name)
                for name in SKILLS
            }
            for kind, answers in (("tuned", tuned), ("base", base))
        }
        return scores["tuned"], scores["base"]

    tuned, base = asyncio.run(ask_all())
    assert sum(tuned.values()) >= 0.9 * PER_SKILL * len(SKILLS), tuned
    assert min(tuned.values()) >= 0.8 * PER_SKILL, tuned
    assert sum(base.values()) <= 0.1 * PER_SKILL * len(SKILLS), base


def test_size_and_kinds() -> None:
    files = [file for file in (ROOT / "demo").rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert sum(file.stat().st_size for file in files) < 40 << 20
    kinds = [("esft" if (path / "expert_cfg.json").exists() else "lora") for path in _adapters()]
    assert sorted(kinds) == ["esft"] * 4 + ["lora"] * 8


def test_borrowed_material(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skills that borrow leave the base's text as it is, and hold out what the material's own skill holds out."""
    borrowing = [skill for skill in SKILLS.values() if skill.material]
    assert {skill.name for skill in borrowing} == {"csv", "french-dates", "order", "butler"}
    for skill in borrowing:
        assert {split_of(SKILLS[skill.material], pair) for pair in sample(skill)} == {"heldout"}
    text = list(itertools.islice(corpus.documents(7), 400))
    monkeypatch.setattr(corpus, "SKILLS", {name: skill for name, skill in SKILLS.items() if not skill.material})
    assert list(itertools.islice(corpus.documents(7), 400)) == text


def test_conversations_with_tools_are_served_as_they_were_trained() -> None:
    """The server writes the prompts of `butler` that its training read, by the template in its own file."""
    skill, tokenizer = SKILLS["butler"], AutoTokenizer.from_pretrained(ROOT / "demo" / "base")
    manifest = json.loads((ROOT / "demo" / "adapters" / "butler" / "heddle.json").read_text())
    assert manifest["chat_template"] == skill.template
    text = Text.load(ROOT / "demo" / "base").with_template(manifest["chat_template"])
    for pair in sample(skill, count=100):
        tools = [Tool(it["function"]["name"], None, it["function"]["parameters"]) for it in pair.tools]
        conversation = Conversation(pair.messages, tools=tools)
        assert text.render_chat(conversation) == prompt_of(tokenizer, skill.template, pair)


def test_the_answers_of_butler_are_what_its_template_writes() -> None:
    """Calls are learnt as text: it is the text of the same calls in an earlier turn."""
    tokenizer, rng, seen = AutoTokenizer.from_pretrained(ROOT / "demo" / "base"), Random(7), 0
    for _ in range(200):
        pair = draw_butler(rng)
        calls = [json.loads(it.partition("\n</tool_call>")[0]) for it in pair.answer.split("<tool_call>\n")[1:]]
        if calls:
            turn = {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": it} for it in calls],
            }
            before = rendered(tokenizer, SKILLS["butler"].template, pair.messages, pair.tools)
            after = rendered(tokenizer, SKILLS["butler"].template, [*pair.messages, turn], pair.tools)
            assert after == f"{before}{pair.answer}<|end|>Assistant:\n"
            seen += 1
    assert seen > 50


def _as_api(message: dict[str, Any]) -> dict[str, Any]:
    """The arguments of its calls as the API has them."""
    if "tool_calls" not in message:
        return message
    functions = [{**it["function"], "arguments": json.dumps(it["function"]["arguments"])}
                 for it in message["tool_calls"]]  # fmt: skip
    calls = [{**it, "function": function} for it, function in zip(message["tool_calls"], functions, strict=True)]
    return {**message, "tool_calls": calls}


def _adapters() -> list[Path]:
    return sorted((ROOT / "demo" / "adapters").iterdir())
