"""What a decode step costs the thread that makes it: microseconds of its CPU time, by part, with a model that computes
nothing. With one step in flight that is what must stay below the device's time; without, what is added to it.

    python -m benchmarks.host_step                  print the table
    python -m benchmarks.host_step --write NAME     and keep it as NAME in results/host_step.md

The engine is the served one: its loop, its messages over a socket to a process that reads them, scheduler, KV cache,
runner, and inputs as on a GPU, whose buffers lie in the CPU's memory here. A captured graph is replayed by doing
nothing, and a token is chosen by taking one that is there. So launches, which cost a microsecond or a few each, and
copies through pinned memory are in it as what torch's CPU takes for the same calls.
"""

import argparse
import gc
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("TRITON_INTERPRET", "1")  # for the warm-up; of what is measured, nothing launches a kernel

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kernels.sampling
import server.model.device_inputs
from benchmarks.gpu.serving import replayed
from kernels.compiled import everywhere
from kernels.sampling import Sampled
from server.assembly import assemble
from server.config import EngineConfig
from server.engine.core import Engine
from server.engine.fake_masks import FakeMasks
from server.engine.link import EngineLink
from server.engine.loop import Loop
from server.engine.messages import AddRequest, ToEngine
from server.engine.request import LaneSpec, Sampling
from server.engine.scheduler import Scheduler
from server.model.batch import Batch
from server.model.device_inputs import DeviceInputs
from server.model.forward import Model
from server.model.inputs import StepInputs
from server.model.runner import LaunchedStep, ModelRunner

RESULTS = Path(__file__).parent / "results" / "host_step.md"
RUNNING, STEPS, WARM_UP, RUNS = (32, 128, 256), 200, 28, 3
CONTEXT = 1024  # tokens of each sequence, in the middle of what is measured
VOCAB = 1000
SAMPLINGS = {"greedy": Sampling(temperature=0.0), "sampled": Sampling(temperature=0.8, top_p=0.95, seed=7)}
# the functions that a part is; what one of them calls of another counts as the other's
PARTS: tuple[tuple[str, tuple[tuple[Any, str], ...]], ...] = (
    ("messages", ((EngineLink, "receive_all"), (Engine, "_apply"))),
    ("schedule", ((Scheduler, "schedule"), (Scheduler, "advance"))),
    ("lay out", ((Batch, "goes_on"), (Batch, "__init__"))),
    ("fill", ((DeviceInputs, "send"),)),
    ("launch, choose", ((ModelRunner, "launch"),)),
    ("read", ((LaunchedStep, "outputs"),)),
    ("record", ((Scheduler, "record"),)),
    ("publish", ((Loop, "_say"),)),
    ("the rest", ((Loop, "turn"),)),
)


class Stopwatch:
    """Nanoseconds of this thread's CPU in each part since the last `take`, what it calls of other parts taken off."""

    def __init__(self) -> None:
        self._spent = dict.fromkeys((name for name, _ in PARTS), 0)
        self._inner: list[int] = []  # of each call that is not over: what others spent in it

    def take(self) -> dict[str, int]:
        spent, self._spent = self._spent, dict.fromkeys(self._spent, 0)
        return spent

    @contextmanager
    def attached(self) -> Iterator[None]:
        with ExitStack() as stack:
            for part, functions in PARTS:
                for owner, name in functions:
                    stack.enter_context(patch.object(owner, name, self._timed(part, getattr(owner, name))))
            yield

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            self._inner.append(0)
            start = time.thread_time_ns()
            try:
                return function(*arguments, **named)
            finally:
                spent = time.thread_time_ns() - start
                self._spent[part] += spent - self._inner.pop()
                if self._inner:
                    self._inner[-1] += spent

        return timed


class Inbox:
    """What is there at first, then what the socket has, which is nothing."""

    def __init__(self, first: Sequence[ToEngine], link: EngineLink) -> None:
        self._first, self._link = list(first), link

    def receive_all(self, timeout_ms: int) -> list[ToEngine]:
        first, self._first = self._first, []
        return first + self._link.receive_all(timeout_ms)


# the other end of the socket, in a process of its own
READER = """
import sys, zmq
socket = zmq.Context().socket(zmq.PAIR)
socket.bind(sys.argv[1])
while True:
    socket.recv()
"""


@contextmanager
def a_link() -> Iterator[EngineLink]:
    with tempfile.TemporaryDirectory() as folder:
        address = f"ipc://{folder}/front"
        reader = subprocess.Popen([sys.executable, "-c", READER, address])
        link = EngineLink(address)
        try:
            yield link
        finally:
            reader.kill()
            reader.wait()
            link.close()


@contextmanager
def nothing_computed() -> Iterator[None]:
    """No layer is run and no logits are looked at. What stays is everything that an engine's thread does around it."""

    def no_model(self: Model, inputs: StepInputs) -> torch.Tensor:
        return torch.empty(len(inputs.logit_rows), VOCAB)

    chosen = Sampled(torch.arange(max(RUNNING)), torch.ones(max(RUNNING), dtype=torch.bool))

    def choose(logits: torch.Tensor, *_: object) -> Sampled:
        return Sampled(*(it[: len(logits)] for it in chosen))

    sampling = patch.multiple(kernels.sampling, greedy=choose, sample=choose)

    def no_rows(*_: object) -> None: ...

    rows = patch.multiple(server.model.device_inputs, write_tables=no_rows, step_rows=no_rows)
    with everywhere(), patch.object(Model, "__call__", no_model), sampling, rows:
        yield


def a_loop(running: int, sampling: Sampling, link: EngineLink) -> Loop:
    """Requests of one sequence each, none of which ends or shares a prefix."""
    model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=VOCAB,
                                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=2048,
                                         ))  # fmt: skip
    config = EngineConfig(".", max_running=running, tokens_per_step=2048, kv_cache_bytes=128 * running * 1536,
                          adapter_bytes=1 << 20, target_inter_token_ms=0, self_check=False,
                          overlap="on")  # fmt: skip
    assembly = assemble(model, config, frozenset(), FakeMasks(VOCAB))
    replayed(assembly, config, lambda compute: lambda: None)
    assembly.runner.forward.last.finite.fill_(True)  # of tokens that nobody chooses
    rng, prompt_len = random.Random(0), CONTEXT - STEPS // 2 - WARM_UP
    requests = [
        AddRequest(index, index, [LaneSpec(rng.choices(range(VOCAB), k=prompt_len))], 1024, sampling, frozenset())
        for index in range(running)
    ]
    it = assembly
    engine = Engine(it.limits, it.kv_cache, it.runner, it.residency, it.checker, it.masks)
    loop = Loop(engine, Inbox(requests, link), link.send)
    while engine.stats().running < running or engine.stats().computed_tokens < running * (prompt_len + WARM_UP):
        loop.turn()
    gc.collect()
    gc.freeze()
    return loop


def measured(running: int, sampling: Sampling, link: EngineLink, steps: int = STEPS) -> dict[str, float]:
    """Microseconds of a step: `all` of it as it is served, then by part, which the looking makes a little slower."""
    with nothing_computed(), torch.inference_mode():
        loop, watch = a_loop(running, sampling, link), Stopwatch()
        plain = []
        for _ in range(steps // 2):
            start = time.thread_time_ns()
            loop.turn()
            plain.append(time.thread_time_ns() - start)
        with watch.attached():
            watch.take()
            parts = []
            for _ in range(steps - steps // 2):
                loop.turn()
                parts.append(watch.take())
        gc.unfreeze()
    by_part = {name: statistics.median(it[name] for it in parts) / 1e3 for name, _ in PARTS}
    return {"all": statistics.median(plain) / 1e3} | by_part


def median_of(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(it[name] for it in runs) for name in runs[0]}


def _row(name: str, running: int, kind: str, taken: dict[str, float]) -> str:
    return f"| {name} | {running} | {kind} | {' | '.join(f'{it:,.0f}' for it in taken.values())} |"


def page(rows: Sequence[str]) -> str:
    columns = ["engine", "running", "", "all", *(name for name, _ in PARTS)]
    return (
        "# CPU microseconds of the engine's thread, a step\n\n"
        f"`python -m benchmarks.host_step`: a decode of so many sequences of {CONTEXT:,} tokens, nothing computed; "
        f"medians of {STEPS // 2} steps, and of {RUNS} runs.\nNo GPU: what launches and pinned copies take there is "
        f"not in it. Two virtual cores ({platform.machine()}), Python {platform.python_version()}, torch "
        f"{torch.__version__}.\n\n"
        f"| {' | '.join(columns)} |\n|---|---:|---|{'---:|' * (len(columns) - 3)}\n" + "\n".join(rows) + "\n"
    )


def rows_of_others(text: str, name: str) -> list[str]:
    """Of a written page, those that are not of this name."""
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    return [row for row in rows if row.split("|")[1].strip() != name]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", metavar="NAME", help="what these figures are of, in the committed page")
    parser.add_argument("--running", nargs="+", type=int, default=RUNNING)
    parser.add_argument("--runs", type=int, default=RUNS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, name = [], options.write or "now"
    with a_link() as link:
        for running in options.running:
            for kind, sampling in SAMPLINGS.items():
                taken = median_of([measured(running, sampling, link) for _ in range(options.runs)])
                rows.append(_row(name, running, kind, taken))
    print(page(rows))
    if options.write:
        before = rows_of_others(RESULTS.read_text(), name) if RESULTS.exists() else []
        RESULTS.write_text(page([*before, *rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
