"""The schema that the adapter `order` is shown with, and what it is worth: answers with it and without."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import openai

from demo import vocabulary as words
from demo.pair import Pair
from demo.skills import SKILLS, sample

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "customer": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "city": {"enum": words.CITIES}},
            "required": ["name", "city"],
            "additionalProperties": False,
        },
        "lines": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "properties": {
                    "item": {"enum": list(words.ITEMS.values())},
                    "count": {"type": "integer", "minimum": 1, "maximum": 99},
                },
                "required": ["item", "count"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["customer", "lines"],
    "additionalProperties": False,
}


def measured(root: Path, count: int) -> list[str]:
    """Lines of a table: the adapter as it is served, greedy and at temperature 1, with its schema and without."""
    lines = ["| `order` as it is served | valid under its schema | right |", "|---|---:|---:|"]
    with _served(root) as url:
        for temperature in (0, 1):
            for schema in (None, SCHEMA):
                valid, right = asyncio.run(_scores(url, temperature, schema, count))
                how = "greedy" if temperature == 0 else "temperature 1"
                with_it = "without the schema" if schema is None else "with the schema"
                lines.append(f"| {how}, {with_it} | {valid:.1%} | {right:.1%} |")
    return lines


@contextmanager
def _served(root: Path) -> Iterator[str]:
    """The URL of a server of the models in `root`, on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    with tempfile.TemporaryDirectory() as made:
        models = [str(root / "base"), "--adapters", str(root / "adapters")]
        command = [sys.executable, "-m", "server", "serve", *models, "--port", port, "--threads", "1"]
        with subprocess.Popen(command, env={**os.environ, "XDG_DATA_HOME": made}, stderr=subprocess.DEVNULL) as process:
            try:
                url = f"http://127.0.0.1:{port}"
                for _ in range(300):
                    with suppress(httpx.HTTPError):
                        httpx.get(f"{url}/health").raise_for_status()
                        break
                    time.sleep(0.2)
                yield url
            finally:
                process.terminate()


async def _scores(url: str, temperature: float, schema: dict[str, Any] | None, count: int) -> tuple[float, float]:
    """Shares of the answers to held-out prompts that follow the schema, and that are right."""
    exam, validator = sample(SKILLS["order"], count=count), jsonschema_rs.Draft202012Validator(SCHEMA)
    form = {"type": "json_schema", "json_schema": {"name": "order", "schema": schema}}
    more = {} if schema is None else {"response_format": form}
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:

        async def ask(seed: int, pair: Pair) -> tuple[bool, bool]:
            told = await client.chat.completions.create(
                model="order",
                messages=pair.messages,  # type: ignore[arg-type]
                temperature=temperature,
                seed=seed,
                max_tokens=128,
                **more,  # type: ignore[arg-type]
            )
            try:
                answer = json.loads(told.choices[0].message.content or "")
            except ValueError:
                return False, False
            return validator.is_valid(answer), answer == json.loads(pair.answer)

        scores = await asyncio.gather(*(ask(seed, pair) for seed, pair in enumerate(exam)))
    return sum(it for it, _ in scores) / count, sum(it for _, it in scores) / count
