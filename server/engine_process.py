"""The engine process: its composition root, and its main loop.

Started by the front as `python -m server.engine_process ADDRESS PARENT`. Needs torch, transformers, safetensors, numpy
and the message codec; never FastAPI or pydantic.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from adapters_store.base_spec import BaseSpec, ExpertStack
from server.config import EngineConfig
from server.engine.core import EngineCore
from server.engine.kv_cache import KVCache
from server.engine.link import EngineLink
from server.engine.messages import Configure, EngineInfo, Progress, Ready, StartFailed, ToFront
from server.engine.scheduler import SchedulerLimits
from server.errors import ConfigError
from server.memory import available_bytes
from server.model.attention import install_paged_attention, probe_kv_shapes
from server.model.experts import RoutedExperts
from server.model.families import UnsupportedModelError, layer_windows, max_model_len, pin_rope, stop_token_ids
from server.model.inputs import CurrentStep
from server.model.loader import OnProgress, inject, load_model
from server.model.lora_linear import LoraLinear
from server.model.runner import ModelRunner
from server.weights.arena import ArenaError, HostArena
from server.weights.expert_stacks import ExpertStacks
from server.weights.lora_slabs import LoraSlabs
from server.weights.page_pool import PagePool
from server.weights.residency import DeviceResidency
from server.weights.transfer import TransferThread

DEFAULT_KV_BYTES = 4 << 30


@dataclass(frozen=True)
class Assembly:
    """Everything that a step needs, built and wired."""

    kv_cache: KVCache
    runner: ModelRunner
    residency: DeviceResidency
    info: EngineInfo
    limits: SchedulerLimits


def build(config: EngineConfig, on_progress: OnProgress) -> Assembly:
    """Load the model that `config` names and build the engine around it."""
    if config.device == "cuda":
        raise ConfigError("device 'cuda' is not served yet; use cpu")
    torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    model, generation = load_model(Path(config.model_dir), dtype, on_progress)
    return assemble(model, config, stop_token_ids(model.config, generation), on_progress)


def assemble(
    model: nn.Module, config: EngineConfig, stops: frozenset[int], on_progress: OnProgress = lambda *_: None
) -> Assembly:
    """Inject our parts into a loaded model and size its caches."""
    dtype = next(model.parameters()).dtype
    length = max_model_len(model.config, config.max_model_len)
    pin_rope(model, model.config, length)
    pool = PagePool(config.adapter_bytes, HostArena.page_bytes)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    stacks = ExpertStacks(config.adapter_slots, config.max_experts_per_adapter, pool)
    slabs = LoraSlabs(config.adapter_slots, pool, dtype)
    residency = DeviceResidency(config.adapter_slots, pool, slabs, stacks, TransferThread())
    step = CurrentStep()
    shapes = probe_kv_shapes(model)  # before injection: the probe runs the model as Transformers made it
    inject(model, step, stacks.add_layer)
    bytes_per_block = sum(shape.elements for shape in shapes) * dtype.itemsize * config.block_size
    num_blocks = (config.kv_cache_bytes or _default_kv_bytes()) // bytes_per_block
    if num_blocks == 0:
        raise ConfigError(
            f"kv_cache_bytes {config.kv_cache_bytes:,} is less than one block ({bytes_per_block:,} bytes)"
        )
    # at most what all running requests can hold at once: prefixes of earlier ones live in what those leave free
    num_blocks = min(num_blocks, config.max_running * -(-length // config.block_size))
    windows = layer_windows(model.config)
    install_paged_attention(model, shapes, windows, num_blocks, config.block_size, step, dtype)
    on_progress("Building the engine", 1, 1)
    info = EngineInfo(
        base=base_spec(model),
        model_type=model.config.model_type,
        num_parameters=num_parameters,
        weight_bytes=num_parameters * dtype.itemsize,
        device="cpu",
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=min(length, num_blocks * config.block_size),
        vocab_size=model.config.vocab_size,
        kv_cache_tokens=num_blocks * config.block_size,
        kv_cache_bytes=num_blocks * bytes_per_block,
        adapter_bytes=pool.num_pages * pool.page_bytes,
        adapter_slots=config.adapter_slots,
        max_experts_per_adapter=stacks.e_max,
        stop_token_ids=stops,
    )
    return Assembly(
        KVCache(num_blocks, config.block_size),
        ModelRunner(model, step, residency, config.block_size),
        residency,
        info,
        SchedulerLimits(config.tokens_per_step, config.max_running, config.max_waiting, config.max_skips),
    )


def base_spec(model: nn.Module) -> BaseSpec:
    """What adapters are checked against, read off the injected model."""
    linears = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, LoraLinear)
    }
    experts = {
        module.layer: ExpertStack(*module.spec) for module in model.modules() if isinstance(module, RoutedExperts)
    }
    return BaseSpec(model.config.model_type, linears, experts)


def _default_kv_bytes() -> int:
    """A quarter of the memory that is available now, at most 4 GiB."""
    return min(DEFAULT_KV_BYTES, available_bytes() // 4)


def main() -> int:
    parser = argparse.ArgumentParser(description="Heddle's engine process; started by `heddle serve`.")
    parser.add_argument("address", help="where the front listens (ZeroMQ)")
    parser.add_argument("parent", type=int, help="the front's process id; without it we end")
    options = parser.parse_args()
    link = EngineLink(options.address)
    first = link.receive_all(60_000)
    if not first or not isinstance(first[0], Configure):
        return 1
    try:
        assembly = build(first[0].config, lambda stage, done, total: link.send(Progress(stage, done, total)))
    except Exception as error:  # whatever it is, the operator hears it from the front
        if not isinstance(error, UnsupportedModelError | ConfigError | ArenaError):
            traceback.print_exc()
        link.send(StartFailed(str(error) or type(error).__name__))
        link.close()
        return 1
    link.send(Ready(assembly.info))
    run(assembly, link, link.send, lambda: os.getppid() == options.parent)
    link.close()
    return 0


def run(
    assembly: Assembly, link: EngineLink, publish: Callable[[ToFront], None], has_parent: Callable[[], bool]
) -> None:
    """Step until told to stop, or until the front is gone: an engine nobody talks to holds memory for nothing."""
    core = EngineCore(assembly.limits, assembly.kv_cache, assembly.runner, assembly.residency, link, publish)
    while not core.is_shut_down and has_parent():
        core.step()


if __name__ == "__main__":
    sys.exit(main())
