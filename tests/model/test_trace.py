"""The trace of steps: what it says is what was computed, and it never stands in the engine's way."""

import json
import logging
import os
from pathlib import Path

import pytest

from server.config import EngineConfig
from server.engine_process import traced
from server.errors import ConfigError
from server.model.probe import PROBE
from server.model.trace import TracedRunner
from tests.support.driver import Driver
from tests.support.engine_harness import Engine, prompts
from tests.support.tiny_adapters import register, save_lora
from tests.support.tiny_models import make_model


def traced_engine(engine: Engine, path: Path) -> Driver:
    it = engine.assembly
    return Driver(it.limits, it.kv_cache, TracedRunner(it.runner, path), it.residency)


def test_each_step_is_a_line(tmp_path: Path) -> None:
    plain = Engine(make_model("llama", attention=PROBE))
    engine = traced_engine(plain, tmp_path / "steps")
    entry = register(plain, save_lora(tmp_path / "lora", make_model("llama"), 1, ("q_proj",)))
    engine.register(entry.ref, entry.package)
    answers = [engine.add(prompt, 4, ref) for prompt in prompts(4) for ref in (None, entry.ref)]
    counts: list[int] = []
    while not engine.is_done:
        plan = engine.step()
        counts += [sum(it.num_tokens for it in plan)] if plan else []
    lines = [json.loads(line) for line in (tmp_path / "steps").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(len(counts)))
    assert [len(line["rows"]["token_ids"]) for line in lines] == counts
    said: dict[int, list[int]] = {answer.id: [] for answer in answers}
    for line in lines:
        rows = line["rows"]
        assert sum(lane["tokens"] for lane in line["lanes"]) == len(rows["token_ids"]) == len(rows["slot_mapping"])
        tuned = [row for start, end, slot in rows["spans"] for row in range(start, end) if slot]
        assert tuned == [row for row, slot in enumerate(rows["token_slots"]) if slot]
        assert (rows["shape"]["rank"] == 4) == bool(tuned)
        assert all((lane["adapter"] == "lora") == bool(lane["slot"]) for lane in line["lanes"])
        for request_id, tokens in line["outputs"].items():
            said[int(request_id)] += tokens
    assert said == {answer.id: answer.tokens for answer in answers}


def test_a_disk_that_is_full_ends_the_trace_and_not_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    engine = traced_engine(Engine(make_model("llama", attention=PROBE)), Path("/dev/full"))
    answer = engine.add([5, 6, 7], 3)
    with caplog.at_level(logging.WARNING):
        while not engine.is_done:
            engine.step()
    assert len(answer.tokens) == 3
    assert caplog.text.count("the trace of steps ends: No space left on device") == 1


def test_a_file_that_cannot_be_written_is_refused_at_start(tmp_path: Path) -> None:
    runner = Engine(make_model("llama", attention=PROBE)).assembly.runner
    assert traced(runner, EngineConfig(".")) is runner
    where = tmp_path / "no such directory" / "steps"
    with pytest.raises(ConfigError, match=f"steps cannot be traced to '{where}': No such file"):
        traced(runner, EngineConfig(".", trace_steps=os.fspath(where)))
