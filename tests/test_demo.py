"""The demo as it is served: every adapter shows its skill, through one server, in the same batches."""

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from demo import corpus
from demo.skills import SKILLS, sample, split_of
from tests.support.live_server import ROOT, LiveServer

pytestmark = pytest.mark.slow
PER_SKILL = 10


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    server = LiveServer(log=tmp_path_factory.mktemp("demo") / "log").wait_ready()  # no arguments: the demo
    yield server
    assert server.stop() == 0, server.output()


def test_every_adapter_is_served(server: LiveServer) -> None:
    models = {it["id"] for it in httpx.get(f"{server.url}/v1/models").json()["data"]}
    assert models == {"heddle-demo", *SKILLS}
    assert "refused" not in server.output()


def test_skills_in_mixed_batches(server: LiveServer) -> None:
    """Exact match on held-out prompts, all adapters at once: at least nine of ten, where the base knows none."""

    async def ask_all() -> tuple[dict[str, int], dict[str, int]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def ask(model: str, question: str) -> str:
                messages = [{"role": "user", "content": question}]
                answer = await client.chat.completions.create(
                    model=model,
                    messages=messages,  # type: ignore[arg-type]
                    temperature=0,
                    max_tokens=80,
                )
                return (answer.choices[0].message.content or "").strip()

            pairs = [(name, pair) for name, skill in SKILLS.items() for pair in sample(skill, count=PER_SKILL)]
            tuned, base = await asyncio.gather(
                asyncio.gather(*(ask(name, pair.question) for name, pair in pairs)),
                asyncio.gather(*(ask("heddle-demo", pair.question) for _, pair in pairs)),
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
    assert sorted(kinds) == ["esft"] * 4 + ["lora"] * 6


def test_borrowed_material(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skills that borrow leave the base's text as it is, and hold out what the material's own skill holds out."""
    borrowing = [skill for skill in SKILLS.values() if skill.material]
    assert {skill.name for skill in borrowing} == {"csv", "french-dates"}
    for skill in borrowing:
        assert {split_of(SKILLS[skill.material], pair) for pair in sample(skill)} == {"heldout"}
    text = list(itertools.islice(corpus.documents(7), 400))
    monkeypatch.setattr(corpus, "SKILLS", {name: skill for name, skill in SKILLS.items() if not skill.material})
    assert list(itertools.islice(corpus.documents(7), 400)) == text


def _adapters() -> list[Path]:
    return sorted((ROOT / "demo" / "adapters").iterdir())
