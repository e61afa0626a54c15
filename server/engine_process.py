"""The engine process: its composition root, and its main loop.

Started by the front as `python -m server.engine_process ADDRESS PARENT`. Needs torch, transformers, safetensors, numpy
and the message codec; never FastAPI or pydantic.
"""

import argparse
import gc
import logging
import os
import sys
import traceback
from pathlib import Path

import torch

from kernels import host
from server.assembly import Assembly, assemble
from server.config import EngineConfig
from server.device import CPU, choose_device, choose_dtype
from server.engine.core import Engine
from server.engine.link import EngineLink
from server.engine.loop import Loop
from server.engine.messages import Configure, Progress, Ready, StartFailed
from server.engine.plan import Runner
from server.errors import ConfigError
from server.grammars.mask_maker import MaskMaker
from server.model.families import Foreign, UnsupportedModelError, stop_token_ids
from server.model.loader import OnProgress, load_model
from server.model.runner import ModelRunner
from server.model.trace import TracedRunner
from server.weights.arena import ArenaError

log = logging.getLogger("heddle.engine")


def build(config: EngineConfig, on_progress: OnProgress) -> Assembly:
    """Load the model that `config` names and build the engine around it."""
    device = choose_device(config.device)
    if device.type == "cpu":
        prepare_host_kernels(on_progress)
    elif config.linear_form != "auto":
        raise ConfigError(f"linear_form {config.linear_form!r} is of products on a CPU, and the device is {device}")
    torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
    model, generation = load_model(Path(config.model_dir), choose_dtype(config.dtype, device), on_progress)
    stops = stop_token_ids(model.config, generation)
    of_model: Foreign = model.config
    masks = MaskMaker(Path(config.model_dir), of_model.vocab_size, stops, config.max_running)
    return assemble(model, config, stops, masks, on_progress, device)


def prepare_host_kernels(on_progress: OnProgress) -> None:
    """The first start on a machine compiles them, which takes some seconds."""
    on_progress("Compiling CPU kernels", 0, 1)
    if not host.takes_on(CPU, torch.float32):
        log.warning("CPU kernels: %s", host.status())
    on_progress("Compiling CPU kernels", 1, 1)


def traced(runner: ModelRunner, config: EngineConfig) -> Runner:
    """The runner, and where `config` says so, one that tells of each step. Raises ConfigError."""
    if config.trace_steps is None:
        return runner
    try:
        return TracedRunner(runner, Path(config.trace_steps))
    except OSError as error:
        raise ConfigError(f"steps cannot be traced to {config.trace_steps!r}: {error.strerror}") from None


def main() -> int:
    parser = argparse.ArgumentParser(description="Heddle's engine process; started by `heddle serve`.")
    parser.add_argument("address", help="where the front listens (ZeroMQ)")
    parser.add_argument("parent", type=int, help="the front's process id; without it we end")
    options = parser.parse_args()
    link = EngineLink(options.address)
    first = link.receive_all(60_000)
    if not first or not isinstance(first[0], Configure):
        return 1
    config = first[0].config
    try:
        assembly = build(config, lambda stage, done, total: link.send(Progress(stage, done, total)))
        runner = traced(assembly.runner, config)
    except Exception as error:  # whatever it is, the operator hears it from the front
        is_final = isinstance(error, UnsupportedModelError | ConfigError)
        if not is_final and not isinstance(error, ArenaError):
            traceback.print_exc()
        link.send(StartFailed(str(error) or type(error).__name__, is_final))
        link.close()
        return 1
    engine = Engine(assembly.limits, assembly.kv_cache, runner, assembly.residency, assembly.checker, assembly.masks)
    gc.collect()
    gc.freeze()  # what was made until now stays: a collection that walked it would hold up a step
    link.send(Ready(assembly.info))
    # without a front nobody could talk to us, and we would hold memory for nothing
    Loop(engine, link, link.send).run(may_go_on=lambda: os.getppid() == options.parent)
    assembly.masks.stop()
    link.close()
    gc.unfreeze()  # else extension modules complain at the end of what is left
    return 0


if __name__ == "__main__":
    sys.exit(main())
