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
from server.device import (
    CPU,
    choose_device,
    choose_dtype,
    choose_tokens_per_step,
    keep_free,
    num_kv_blocks,
    require_room,
)
from server.engine.core import EngineCore
from server.engine.kv_cache import KVCache
from server.engine.link import EngineLink
from server.engine.messages import Configure, EngineInfo, Progress, Ready, StartFailed, ToFront
from server.engine.scheduler import SchedulerLimits
from server.errors import ConfigError
from server.model.attention import CachedLayer, PagedLayer, cache_bytes, install
from server.model.cuda_graphs import CudaCapture, GraphedForward
from server.model.device_inputs import Capacity, DeviceInputs
from server.model.experts import Stacks
from server.model.families import UnsupportedModelError, layer_windows, max_model_len, pin_rope, stop_token_ids
from server.model.forward import Forward, HostForward, KernelForward, Model
from server.model.inputs import CurrentStep
from server.model.loader import Injected, OnProgress, inject, load_model
from server.model.mla import LatentLayer, latent_shape
from server.model.probe import KVShape, Probed, probe
from server.model.runner import ModelRunner
from server.model.warm_up import warm_up
from server.weights.arena import ArenaError
from server.weights.choice import choose_arenas, choose_copier
from server.weights.expert_stacks import ExpertStacks
from server.weights.lora_slabs import LoraSlabs
from server.weights.page_pool import PagePool
from server.weights.residency import DeviceResidency
from server.weights.transfer import TransferThread


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
    device = choose_device(config.device)
    torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
    model, generation = load_model(Path(config.model_dir), choose_dtype(config.dtype, device), on_progress)
    return assemble(model, config, stop_token_ids(model.config, generation), on_progress, device)


def assemble(
    model: nn.Module,
    config: EngineConfig,
    stops: frozenset[int],
    on_progress: OnProgress = lambda *_: None,
    device: torch.device = CPU,
    by_kernels: bool | None = None,
) -> Assembly:
    """Inject our parts into a loaded model, wherever it is, move it to `device` and size its caches.

    by_kernels: None is the device's own way; True sends a CPU's model through Triton's interpreter.
    """
    if by_kernels is None:
        by_kernels = device.type == "cuda"
    dtype = next(model.parameters()).dtype
    length = max_model_len(model.config, config.max_model_len)
    pin_rope(model, model.config, length)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens_per_step = choose_tokens_per_step(config, device)
    require_room(device, num_parameters * dtype.itemsize, config.adapter_bytes)
    arenas = choose_arenas(device)
    pool = PagePool(config.adapter_bytes, arenas.page_bytes)
    stacks = ExpertStacks(config.adapter_slots, config.max_experts_per_adapter, pool, arenas)
    slabs = LoraSlabs(config.adapter_slots, pool, dtype, arenas)
    step = CurrentStep()
    probed = probe(model)  # before injection: the probe runs the model as Transformers made it
    injected = inject(model, probed, step, lambda *layer: Stacks(*stacks.add_layer(*layer)), by_kernels)
    model.to(device)
    for target in injected.targets:
        slabs.bind(target.name, target.sites)
    if by_kernels:
        slabs.make_table(device)
    residency = DeviceResidency(
        config.adapter_slots, pool, slabs, stacks, arenas, TransferThread(), choose_copier(device)
    )
    shapes = [
        latent_shape(attention) if attention in injected.absorbed else shape for attention, shape in probed.attention
    ]
    bytes_per_block = cache_bytes(shapes, config.block_size, dtype)
    adapter_bytes = pool.num_free * pool.page_bytes  # what is not taken yet
    num_blocks = num_kv_blocks(config, length, bytes_per_block, device, adapter_bytes)
    keep_free(device, adapter_bytes)
    install_caches(model, probed, injected, shapes, num_blocks, config.block_size, step)
    forward = make_forward(
        model, step, residency, config, tokens_per_step, num_blocks, length, dtype, device, by_kernels
    )
    if isinstance(forward, GraphedForward):
        warm_up(forward, residency.sites, bool(injected.experts), config.block_size, on_progress)
    on_progress("Building the engine", 1, 1)
    info = EngineInfo(
        base=base_spec(model.config.model_type, injected),
        model_type=model.config.model_type,
        num_parameters=num_parameters,
        weight_bytes=num_parameters * dtype.itemsize,
        device=str(device),
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
        ModelRunner(forward, residency, config.block_size),
        residency,
        info,
        SchedulerLimits(tokens_per_step, config.max_running, config.max_waiting, config.max_skips),
    )


def install_caches(
    model: nn.Module, probed: Probed, injected: Injected, shapes: list[KVShape], num_blocks: int, block_size: int,
    step: CurrentStep,
) -> None:  # fmt: skip
    """Give every layer the cache of its kind."""
    like = next(model.parameters())
    layers: list[tuple[nn.Module, CachedLayer]] = []
    for (attention, _), shape, window in zip(probed.attention, shapes, layer_windows(model.config), strict=True):
        projection = injected.absorbed.get(attention)
        if projection is None:
            layers.append((attention, PagedLayer(shape, num_blocks, block_size, window, step, like)))
        else:
            assert window is None
            layers.append((attention, LatentLayer(projection, shape, num_blocks, block_size, step, like)))
    install(model, layers)


def make_forward(
    model: nn.Module, step: CurrentStep, residency: DeviceResidency, config: EngineConfig, tokens_per_step: int,
    num_blocks: int, length: int,
    dtype: torch.dtype, device: torch.device, by_kernels: bool,
) -> Forward:  # fmt: skip
    """References on the host; kernels, and graphs where there are any."""
    function = Model(model, step)
    if not by_kernels:
        return HostForward(function, config.block_size, dtype)
    blocks = min(num_blocks, -(-length // config.block_size))
    most_slices = max((len(site.widths) for site in residency.sites), default=1)
    capacity = Capacity(tokens_per_step, config.max_running, blocks, most_slices)
    inputs = DeviceInputs(capacity, device)
    if device.type == "cuda":
        return GraphedForward(function, inputs, residency, config.max_running, CudaCapture())
    return KernelForward(function, inputs, residency)


def base_spec(model_type: str, injected: Injected) -> BaseSpec:
    """What adapters are checked against."""
    linears = {target.name: target.shape for target in injected.targets}
    return BaseSpec(model_type, linears, {it.layer: ExpertStack(*it.spec) for it in injected.experts})


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
