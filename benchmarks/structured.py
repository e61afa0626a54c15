"""Answers under a schema: are all of them valid, do they leave other requests alone, and what do they cost?

    python -m benchmarks.structured [--schemas 200] [--write]           (make structured)

A real server over the demo. Random schemas, greedy and at temperature 1, are mixed with requests without any, whose
tokens must be those that they had alone. Every answer that came to an end by itself is checked by a validator that
shares nothing with the server. Then the adapter `order` is measured with its schema and without. Exit status 1 where an
answer is not valid, a request failed or a neighbour's tokens changed. --write makes benchmarks/results/structured.md.
"""

import argparse
import asyncio
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from random import Random
from typing import Any

import httpx
import jsonschema_rs

from benchmarks.served import ROOT
from demo.order import SCHEMA
from demo.skills import SKILLS, sample
from tests.support.live_server import LiveServer
from tests.support.random_schemas import schemas

RESULTS = ROOT / "benchmarks" / "results" / "structured.md"
BASE = "heddle-demo"
SKILLED = ("roman", "json", "csv", "french-numbers", "sql", "spanish")  # whose answers are compared
AT_ONCE = 24
MOST_TOKENS = 160
NUM_HELD_OUT = 200
Body = dict[str, Any]


@dataclass
class Outcome:
    """Of requests under schemas. `refused`: before anything was generated, with the reasons (some schemas are such that
    nothing follows them); `cut`: by max_tokens."""

    valid: int = 0
    cut: int = 0
    refused: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def take(self, schema: Any, status: int, told: Body) -> None:
        if status == 400 and told["error"]["code"] in ("invalid_grammar", "unsupported_grammar"):
            self.refused.append(told["error"]["message"])
        elif status != 200:
            self.problems.append(f"{status} for {json.dumps(schema)}: {told['error']['message']}")
        elif (choice := told["choices"][0])["finish_reason"] == "stop":
            self._check(schema, choice["message"]["content"])
        else:
            self.cut += 1

    def _check(self, schema: Any, content: str) -> None:
        try:
            is_valid = jsonschema_rs.Draft202012Validator(schema).is_valid(json.loads(content))
        except ValueError:
            is_valid = False
        if is_valid:
            self.valid += 1
        else:
            self.problems.append(f"not valid: {content!r} for {json.dumps(schema)}")


def formed(schema: Any) -> Body:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def under(all_schemas: Sequence[Any], temperature: float) -> list[Body]:
    """A request for each schema, of the base and of adapters in turns."""
    models = (BASE, *SKILLED)
    questions = [it.question for it in sample(SKILLS["json"], count=20)]
    return [
        {"model": models[index % len(models)], "temperature": temperature, "seed": index, "max_tokens": MOST_TOKENS,
         "messages": [{"role": "user", "content": questions[index % len(questions)]}], "response_format": formed(it)}
        for index, it in enumerate(all_schemas)
    ]  # fmt: skip


def neighbours(count: int) -> list[Body]:
    """Requests without a schema, greedy and at temperature 1."""
    pairs = [(name, it.question) for name in SKILLED for it in sample(SKILLS[name], count=count)]
    return [
        {"model": model, "temperature": index % 2, "seed": index, "max_tokens": 40, "logprobs": True,
         "messages": [{"role": "user", "content": question}]}
        for index, (model, question) in enumerate(pairs)
    ]  # fmt: skip


async def _all(url: str, bodies: Sequence[Body], at_once: int) -> list[tuple[int, Body]]:
    """What each was answered."""
    room = asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(timeout=300) as client:

        async def ask(body: Body) -> tuple[int, Body]:
            async with room:
                told = await client.post(f"{url}/v1/chat/completions", json=body)
                return told.status_code, told.json()

        return await asyncio.gather(*map(ask, bodies))


def asked(url: str, bodies: Sequence[Body], at_once: int = AT_ONCE) -> list[tuple[int, Body]]:
    return asyncio.run(_all(url, bodies, at_once))


def tokens_of(answers: Sequence[tuple[int, Body]]) -> list[list[str]]:
    return [[it["token"] for it in told["choices"][0]["logprobs"]["content"]] for _, told in answers]


def mixed(url: str, all_schemas: Sequence[Any], num_neighbours: int) -> tuple[dict[str, Outcome], int]:
    """Outcomes by temperature, and how many of the neighbours had other tokens than alone."""
    plain = neighbours(num_neighbours)
    alone = tokens_of(asked(url, plain, at_once=1))
    outcomes, num_changed = {}, 0
    for temperature in (0, 1):
        constrained = under(all_schemas, temperature)
        order = Random(temperature).sample(range(len(constrained) + len(plain)), len(constrained) + len(plain))
        both = [*constrained, *plain]
        answers = dict(zip(order, asked(url, [both[it] for it in order]), strict=True))
        outcome = outcomes[f"temperature {temperature}"] = Outcome()
        for index, schema in enumerate(all_schemas):
            outcome.take(schema, *answers[index])
        beside = tokens_of([answers[len(constrained) + index] for index in range(len(plain))])
        num_changed += sum(one != other for one, other in zip(alone, beside, strict=True))
    return outcomes, num_changed


def scores(url: str, temperature: float, constrained: bool) -> tuple[float, float]:
    """Of the adapter `order` on its held-out prompts: shares of answers that follow its schema, and that are right."""
    exam, more = sample(SKILLS["order"], count=NUM_HELD_OUT), {"response_format": formed(SCHEMA)} if constrained else {}
    bodies = [
        {"model": "order", "temperature": temperature, "seed": index, "max_tokens": MOST_TOKENS, **more,
         "messages": [{"role": "user", "content": it.question}]}
        for index, it in enumerate(exam)
    ]  # fmt: skip
    answers = [_json_of(told["choices"][0]["message"]["content"]) for _, told in asked(url, bodies)]
    validator = jsonschema_rs.Draft202012Validator(SCHEMA)
    right = [it == json.loads(pair.answer) for it, pair in zip(answers, exam, strict=True)]
    return statistics.mean(map(validator.is_valid, answers)), statistics.mean(right)


def _json_of(content: str) -> Any:
    """None for what is no JSON, which is of no schema here."""
    try:
        return json.loads(content)
    except ValueError:
        return None


@dataclass(frozen=True)
class Speed:
    """Of one round: tokens a second of all requests; masks made, their seconds of a processor, and those too late."""

    tokens_per_s: float
    masks: float = 0
    seconds: float = 0
    late: float = 0


def speed(server: LiveServer, count: int, constrained: bool) -> Speed:
    """So many orders at once, in the same tokens with their schema as without, or nearly."""
    more = {"response_format": formed(SCHEMA)} if constrained else {}
    bodies = [
        {"model": "order", "temperature": 0, "max_tokens": MOST_TOKENS, **more,
         "messages": [{"role": "user", "content": it.question}]}
        for it in sample(SKILLS["order"], count=count)
    ]  # fmt: skip
    before, begin = server.stats(), time.perf_counter()
    answers = asked(server.url, bodies, at_once=count)
    seconds, after = time.perf_counter() - begin, server.stats()
    tokens = sum(told["usage"]["completion_tokens"] for _, told in answers)
    names = ("heddle_masks_total", "heddle_mask_seconds_total", "heddle_late_masks_total")
    return Speed(tokens / seconds, *(after[it] - before[it] for it in names))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemas", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--at-once", type=int, default=16, help="requests of a round of the speeds")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as made:
        server = LiveServer(log=Path(made) / "log").wait_ready()  # no arguments: the demo
        try:
            outcomes, num_changed = mixed(server.url, schemas(options.schemas), 8)
            worth = [(temperature, bound, *scores(server.url, temperature, bound))
                     for temperature in (0, 1) for bound in (False, True)]  # fmt: skip
            rounds = [(speed(server, options.at_once, False), speed(server, options.at_once, True))
                      for _ in range(options.rounds)]  # fmt: skip
        finally:
            server.stop()
    page = f"{_told(options.schemas, outcomes, num_changed)}\n{_worth(worth)}\n{_speeds(rounds, options.at_once)}"
    print(page)
    problems = [problem for it in outcomes.values() for problem in it.problems]
    print("\n".join(problems), file=sys.stderr)
    if options.write:
        head = f"On {len(os.sched_getaffinity(0))} cores; `make structured`, {date.today()}."
        RESULTS.write_text(f"# Answers under a schema\n\n{head}\n\n{page}", encoding="utf-8")
    return int(bool(problems) or num_changed > 0)


def _told(count: int, outcomes: dict[str, Outcome], num_changed: int) -> str:
    rows = [
        f"| {name} | {it.valid} | {it.cut} | {len(it.refused)} | {len(it.problems)} |" for name, it in outcomes.items()
    ]
    return (
        f"{count} random schemas, of the base and {len(SKILLED)} adapters in turns, {AT_ONCE} requests at once, "
        f"at most {MOST_TOKENS} tokens. Valid are the answers that ended by themselves and follow their schema by "
        "another validator; the others were cut by the limit, or refused with a reason before anything was generated."
        "\n\n"
        "| | valid | cut | refused | not valid or failed |\n|---|---:|---:|---:|---:|\n" + "\n".join(rows) + "\n\n"
        f"Refused, greedy, because:\n\n{_reasons(outcomes)}\n\n"
        f"Requests without a schema in the same batches whose tokens were not those that they had alone: {num_changed} "
        f"of {2 * len(SKILLED) * 8}.\n"
    )


def _reasons(outcomes: dict[str, Outcome]) -> str:
    """Of the first outcome: the reasons without what they quote, with how often each was given."""
    first = next(iter(outcomes.values()))
    counts = Counter(re.sub(r"'[^']*'|\"[^\"]*\"", "…", it) for it in first.refused)
    return "\n".join(f"- {count}: {reason}" for reason, count in counts.most_common())


def _worth(rows: Sequence[tuple[int, bool, float, float]]) -> str:
    lines = [
        f"| temperature {temperature}, {'with' if bound else 'without'} the schema | {valid:.1%} | {right:.1%} |"
        for temperature, bound, valid, right in rows
    ]
    return (
        f"The adapter `order` on {NUM_HELD_OUT} held-out prompts:\n\n"
        "| | valid under its schema | right |\n|---|---:|---:|\n" + "\n".join(lines) + "\n"
    )


def _speeds(rounds: Sequence[tuple[Speed, Speed]], at_once: int) -> str:
    free, bound = ([it[index].tokens_per_s for it in rounds] for index in (0, 1))
    masks, seconds, late = (sum(getattr(it, name) for _, it in rounds) for name in ("masks", "seconds", "late"))
    ratios = [b / a for a, b in zip(free, bound, strict=True)]
    return (
        f"{at_once} orders at once for the adapter `order`, {len(rounds)} rounds in turns, median "
        "(lowest to highest):\n\n"
        "| | |\n|---|---:|\n"
        f"| without a schema | {_spread(free, 0)} tok/s |\n| with its schema | {_spread(bound, 0)} tok/s |\n"
        f"| with / without | {_spread(ratios, 2)} |\n"
        f"| a mask | {seconds / max(masks, 1) * 1e6:.0f} µs of a processor |\n"
        f"| masks that came late | {late / max(masks, 1):.1%} of {masks:,.0f} |\n"
    )


def _spread(values: Sequence[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    sys.exit(main())
