"""What each step computes, as lines of JSON: for people who want to see one (docs/architecture.md walks through it)."""

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path

from server.engine.plan import Output, Pending, Plan
from server.engine.request import Lane
from server.model.inputs import HostStep
from server.model.runner import ModelRunner

log = logging.getLogger("heddle.trace")


class TracedRunner:
    """A runner that appends a line to a file for each step, once its outputs are known.

    step       counts from 0
    seconds    from launch to outputs
    lanes      of the plan, in order of adapter slot: whose they are, from which token on and how many, and their blocks
    rows       the lists that the model computes with (HostStep); spans are [first row, row behind, adapter slot]
    outputs    by request id: tokens, or an error
    """

    def __init__(self, runner: ModelRunner, path: Path) -> None:
        """Raises OSError if the file cannot be written."""
        self._runner = runner
        self._path: Path | None = path
        self._num_steps = 0
        path.open("a").close()

    def launch(self, plan: Plan) -> "_TracedStep":
        start = time.perf_counter()
        line = {"step": self._num_steps} | _described(plan, self._runner.lay_out(plan))
        self._num_steps += 1
        return _TracedStep(self._runner.launch(plan), self, line, start)

    def write(self, line: dict[str, object]) -> None:
        """A full disk ends the trace, and not the engine."""
        if self._path is None:
            return
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            log.warning("the trace of steps ends: %s", error.strerror)
            self._path = None


class _TracedStep:
    def __init__(self, pending: Pending, trace: TracedRunner, line: dict[str, object], start: float) -> None:
        self._pending, self._trace, self._line, self._start = pending, trace, line, start

    def outputs(self) -> Mapping[Lane, Output]:
        outputs = self._pending.outputs()
        told = {
            lane.request.id: output.error or [token.id for token in output.tokens] for lane, output in outputs.items()
        }
        seconds = round(time.perf_counter() - self._start, 6)
        self._trace.write(self._line | {"outputs": told, "seconds": seconds})
        return outputs


_NUMBERS = ("token_ids", "positions", "slot_mapping", "token_slots", "query_lens", "kv_lens", "sample_rows",
            "logit_rows")  # fmt: skip


def _described(plan: Plan, step: HostStep) -> dict[str, object]:
    lanes = [
        {
            "request": it.lane.request.id,
            "lane": it.lane.request.lanes.index(it.lane),
            "adapter": it.lane.adapter.name if it.lane.adapter else None,
            "slot": it.lane.slot,
            "start": it.start,
            "tokens": it.num_tokens,
            "samples": it.samples,
            "blocks": list(it.lane.block_table),  # the lane may be given more before this is written
        }
        for it in sorted(plan, key=lambda it: it.lane.slot)
    ]
    rows = {
        **{name: getattr(step, name).tolist() for name in _NUMBERS},
        "spans": step.spans,
        "logit_spans": step.logit_spans,
        "shape": step.shape._asdict(),
    }
    return {"lanes": lanes, "rows": rows}
