"""An engine, built and wired: what a step needs, for the model and the device at hand."""

from dataclasses import dataclass

import torch
from torch import nn

from adapters_store.base_spec import BaseSpec, ExpertStack
from kernels.compiled import takes_on
from server.config import EngineConfig
from server.device import CPU, choose_tokens_per_step, keep_free, num_kv_blocks, require_room
from server.engine.kv_cache import KVCache
from server.engine.messages import EngineInfo
from server.engine.scheduler import SchedulerLimits
from server.model.attention import CachedLayer, PagedLayer, cache_bytes, install
from server.model.cuda_graphs import CudaCapture, GraphedForward
from server.model.device_inputs import Capacity, DeviceInputs
from server.model.experts import Stacks
from server.model.families import layer_windows, max_model_len, pin_rope
from server.model.forward import Forward, HostForward, KernelForward, Model
from server.model.inputs import CurrentStep
from server.model.loader import Injected, OnProgress, inject
from server.model.mla import LatentLayer, latent_shape
from server.model.probe import KVShape, Probed, probe
from server.model.runner import ModelRunner
from server.model.warm_up import warm_up
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


@dataclass(frozen=True)
class _Adapters:
    """The paged weight manager: one budget, the memory of both kinds of adapter, and who is there."""

    pool: PagePool
    stacks: ExpertStacks
    slabs: LoraSlabs
    residency: DeviceResidency


def assemble(
    model: nn.Module,
    config: EngineConfig,
    stops: frozenset[int],
    on_progress: OnProgress = lambda *_: None,
    device: torch.device = CPU,
) -> Assembly:
    """Inject our parts into a loaded model, wherever it is, move it to `device` and size its caches."""
    dtype = next(model.parameters()).dtype
    length = max_model_len(model.config, config.max_model_len)
    pin_rope(model, model.config, length)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    require_room(device, num_parameters * dtype.itemsize, config.adapter_bytes)
    adapters = _make_adapters(config, device, dtype)
    step = CurrentStep()
    probed = probe(model)  # before injection: the probe runs the model as Transformers made it
    injected = inject(model, probed, step, lambda *it: Stacks(*adapters.stacks.add_layer(*it)))
    model.to(device)
    for target in injected.targets:
        adapters.slabs.bind(target.name, target.sites)
    if takes_on(device):
        adapters.slabs.make_table(device)
    bytes_per_block = cache_bytes(cached_shapes(probed, injected), config.block_size, dtype)
    adapter_bytes = adapters.pool.num_free * adapters.pool.page_bytes  # what adapters have not taken yet
    num_blocks = num_kv_blocks(config, length, bytes_per_block, device, adapter_bytes)
    keep_free(device, adapter_bytes)
    install_caches(model, probed, injected, num_blocks, config.block_size, step)
    limits = SchedulerLimits(
        choose_tokens_per_step(config, device), config.max_running, config.max_waiting, config.max_skips
    )
    forward: Forward = HostForward(Model(model, step), config.block_size, dtype)
    if takes_on(device):
        blocks = min(num_blocks, -(-length // config.block_size))
        forward = _by_kernels(Model(model, step), adapters.residency, limits, blocks, device)
    if isinstance(forward, KernelForward) and device.type == "cuda":
        logits = torch.empty(limits.max_running, model.config.vocab_size, dtype=dtype, device=device)
        forward = GraphedForward(forward, logits, config.max_rank, CudaCapture())
        warm_up(forward, bool(injected.experts), config.block_size, on_progress)
    on_progress("Building the engine", 1, 1)
    info = EngineInfo(
        base=_base_spec(model.config.model_type, injected),
        model_type=model.config.model_type,
        num_parameters=num_parameters,
        weight_bytes=num_parameters * dtype.itemsize,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=min(length, num_blocks * config.block_size),
        vocab_size=model.config.vocab_size,
        kv_cache_tokens=num_blocks * config.block_size,
        kv_cache_bytes=num_blocks * bytes_per_block,
        adapter_bytes=adapters.pool.num_pages * adapters.pool.page_bytes,
        max_experts_per_adapter=adapters.stacks.e_max,
        stop_token_ids=stops,
        graph_rank=config.max_rank if isinstance(forward, GraphedForward) else None,
    )
    cache = KVCache(num_blocks, config.block_size)
    runner = ModelRunner(forward, adapters.residency, config.block_size)
    return Assembly(cache, runner, adapters.residency, info, limits)


def _make_adapters(config: EngineConfig, device: torch.device, dtype: torch.dtype) -> _Adapters:
    arenas = choose_arenas(device)
    pool = PagePool(config.adapter_bytes, arenas.page_bytes)
    stacks = ExpertStacks(config.adapter_slots, config.max_experts_per_adapter, pool, arenas)
    slabs = LoraSlabs(config.adapter_slots, pool, dtype, arenas)
    transfers, copier = TransferThread(), choose_copier(device)
    residency = DeviceResidency(config.adapter_slots, pool, slabs, stacks, arenas, transfers, copier)
    return _Adapters(pool, stacks, slabs, residency)


def cached_shapes(probed: Probed, injected: Injected) -> list[KVShape]:
    """What a token caches in each layer."""
    return [latent_shape(it) if it in injected.absorbed else shape for it, shape in probed.attention]


def install_caches(
    model: nn.Module, probed: Probed, injected: Injected, num_blocks: int, block_size: int, step: CurrentStep
) -> None:
    """Give every layer the cache of its kind."""
    like = next(model.parameters())

    def cache(attention: nn.Module, shape: KVShape, window: int | None) -> CachedLayer:
        projection = injected.absorbed.get(attention)
        if projection is None:
            return PagedLayer(shape, num_blocks, block_size, window, step, like)
        assert window is None
        return LatentLayer(projection, shape, num_blocks, block_size, step, like)

    modules = [attention for attention, _ in probed.attention]
    layers = zip(modules, cached_shapes(probed, injected), layer_windows(model.config), strict=True)
    install(model, [(attention, cache(attention, shape, window)) for attention, shape, window in layers])


def _by_kernels(
    function: Model, residency: DeviceResidency, limits: SchedulerLimits, blocks: int, device: torch.device
) -> KernelForward:
    """blocks: of one sequence, at most."""
    most_slices = max((len(site.widths) for site, _ in residency.sites), default=1)
    capacity = Capacity(limits.tokens_per_step, limits.max_running, blocks, most_slices)
    return KernelForward(function, DeviceInputs(capacity, device))


def _base_spec(model_type: str, injected: Injected) -> BaseSpec:
    """What adapters are checked against."""
    linears = {target.name: target.shape for target in injected.targets}
    return BaseSpec(model_type, linears, {it.layer: ExpertStack(*it.spec) for it in injected.experts})
