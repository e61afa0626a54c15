"""An engine, built and wired: what a step needs, for the model and the device at hand."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from adapters_store.base_spec import BaseSpec, ExpertStack
from kernels import host
from kernels.adapter_rows import ShapeKey
from kernels.compiled import takes_on
from server.config import EngineConfig
from server.device import CPU, choose_target_s, choose_tokens_per_step, keep_free, num_kv_blocks, require_room
from server.engine.kv_cache import KVCache
from server.engine.messages import EngineInfo
from server.engine.scheduler import SchedulerLimits
from server.model.build import Build, Injected
from server.model.cuda_graphs import CudaCapture, GraphedForward, decode_shapes
from server.model.device_inputs import Capacity, DeviceInputs
from server.model.experts import Stacks
from server.model.families import Foreign, fused_rows, max_model_len, pin_rope
from server.model.forward import Forward, HostForward, KernelForward, Model
from server.model.injections import inject
from server.model.inputs import CurrentStep, TokenField
from server.model.linear_forms import FormChooser
from server.model.linear_times import LinearTimes, cache_directory
from server.model.loader import OnProgress
from server.model.lora_op import LoraOps
from server.model.packed import Made, PackedProducts
from server.model.parity import ParityChecker, Prefills
from server.model.probe import probe
from server.model.product import product_of
from server.model.runner import ModelRunner
from server.model.site_op import SiteOps
from server.model.warm_up import warm_up
from server.weights.choice import choose_arenas, choose_copier
from server.weights.kv_memory import KVMemory
from server.weights.merged import MergedAdapter
from server.weights.page_pool import PagePool
from server.weights.residency import DeviceResidency
from server.weights.tables.experts import ExpertTable
from server.weights.tables.lora import LoraTable
from server.weights.transfer import TransferThread


class Tables(NamedTuple):
    """What the device holds of adapters, a table for each kind of part (CONTRIBUTING.md says what a new one needs)."""

    lora: LoraTable
    experts: ExpertTable


@dataclass(frozen=True)
class Assembly:
    """Everything that a step needs, built and wired."""

    kv_cache: KVCache
    runner: ModelRunner
    residency: DeviceResidency
    checker: ParityChecker
    tables: Tables
    linears: tuple[Made, ...]  # on a CPU: the forms that they are kept in
    info: EngineInfo
    limits: SchedulerLimits


def assemble(
    model: Foreign,
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
    arenas = choose_arenas(device)
    pool = PagePool(config.adapter_bytes, arenas.page_bytes)
    tables = Tables(
        LoraTable(config.adapter_slots, pool, arenas),
        ExpertTable(config.adapter_slots, config.max_experts_per_adapter, pool, arenas),
    )
    residency = DeviceResidency(config.adapter_slots, pool, tables, arenas, TransferThread(), choose_copier(device))
    step = CurrentStep()
    site_ops: list[SiteOps] = [LoraOps(tables.lora, step)]
    biased = frozenset(name.rpartition(".")[0] for name, _ in model.named_parameters() if name.endswith("bias"))
    probed = probe(model)  # before injection: the probe runs the model as Transformers made it
    packed = _packed_products(model, config) if device.type == "cpu" else None
    make_product = packed.product_of if packed else product_of
    build = Build(model, probed, step, site_ops, lambda *it: Stacks(*tables.experts.add_layer(*it)), make_product)
    injected = inject(build)
    linears = packed.finish(model) if packed else ()
    model.to(device)
    if takes_on(device) or host.takes_on(device, dtype):
        tables.lora.show_kernels(device)
    adapter_bytes = pool.num_free * pool.page_bytes  # what adapters have not taken yet
    cache = _allocate_cache(injected, config, length, dtype, device, adapter_bytes)
    limits = _limits(config, device, model.config.vocab_size)
    most_slices = max((len(site.widths) for site in tables.lora.sites), default=1)
    blocks_of_one = min(cache.pool.num_blocks, cache.num_blocks(length))
    choices = max((it.choices for it in injected.experts), default=0)
    capacity = Capacity(limits.tokens_per_step, limits.max_running, blocks_of_one, most_slices, choices)
    shapes = decode_shapes(config.max_rank, bool(injected.experts))
    fields = [field for ops in site_ops for field in ops.token_fields]
    forward = choose_forward(Model(model, step), config, capacity, shapes, fields, dtype, device)
    if isinstance(forward, GraphedForward):
        warm_up(forward, config.block_size, on_progress)
    on_progress("Building the engine", 1, 1)
    info = EngineInfo(
        base=_base_spec(model.config, injected, biased),
        model_type=model.config.model_type,
        num_parameters=num_parameters,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=min(length, cache.capacity),
        vocab_size=model.config.vocab_size,
        kv_cache_tokens=cache.capacity,
        kv_cache_bytes=cache.pool.num_blocks * _block_bytes(injected, config, dtype),
        adapter_bytes=pool.num_pages * pool.page_bytes,
        max_experts_per_adapter=tables.experts.e_max,
        stop_token_ids=stops,
        hidden_size=model.config.hidden_size,
        graph_rank=config.max_rank if isinstance(forward, GraphedForward) else None,
    )
    checker = ParityChecker(
        model,
        injected.experts,
        Prefills(forward, residency, config.block_size),
        lambda ref: MergedAdapter(*residency.source(ref)),
        min(limits.tokens_per_step, info.max_model_len),
        info.vocab_size,
    )
    runner = ModelRunner(forward, residency, config.block_size)
    return Assembly(cache, runner, residency, checker, tables, linears, info, limits)


def _packed_products(model: Foreign, config: EngineConfig) -> PackedProducts:
    times = LinearTimes(cache_directory(), torch.get_num_threads())
    return PackedProducts(FormChooser(config.linear_form, times), model)


def _block_bytes(injected: Injected, config: EngineConfig, dtype: torch.dtype) -> int:
    """Of one block in all layers."""
    return sum(layer.shape.elements for layer in injected.layers) * dtype.itemsize * config.block_size


def _allocate_cache(
    injected: Injected, config: EngineConfig, length: int, dtype: torch.dtype, device: torch.device, adapter_bytes: int
) -> KVCache:
    """Memory for keys and values in every layer, in what weights and adapters leave; returns its bookkeeping."""
    block_bytes = _block_bytes(injected, config, dtype)
    num_blocks = num_kv_blocks(config, length, block_bytes, device, adapter_bytes)
    keep_free(device, adapter_bytes)
    memory = KVMemory(num_blocks, config.block_size, dtype, device)
    for layer in injected.layers:
        layer.allocate(memory.tensor)
    return KVCache(num_blocks, config.block_size)


def _limits(config: EngineConfig, device: torch.device, vocab_size: int) -> SchedulerLimits:
    tokens_per_step = choose_tokens_per_step(config, device)
    return SchedulerLimits(
        tokens_per_step,
        config.max_running,
        config.max_waiting,
        config.max_skips,
        vocab_size=vocab_size,
        target_inter_token_s=choose_target_s(config, device),
    )


def choose_forward(
    model: Model,
    config: EngineConfig,
    capacity: Capacity,
    shapes: Sequence[ShapeKey],
    token_fields: Sequence[TokenField],
    dtype: torch.dtype,
    device: torch.device,
) -> Forward:
    """The references on a host; kernels and captured graphs on a GPU."""
    if not takes_on(device):
        return HostForward(model, config.block_size, dtype, token_fields)
    by_kernels = KernelForward(model, DeviceInputs(capacity, device, token_fields))
    if device.type != "cuda":
        return by_kernels
    logits = torch.empty(config.max_running, model.vocab_size, dtype=dtype, device=device)
    return GraphedForward(by_kernels, logits, shapes, CudaCapture())


def _base_spec(config: Foreign, injected: Injected, biased: frozenset[str]) -> BaseSpec:
    """What adapters are checked against."""
    linears = {target.name: target.shape for target in injected.targets}
    experts = {it.spec.layer: ExpertStack(*it.spec) for it in injected.experts}
    fused = {name: rows for name, (out, _) in linears.items() if (rows := fused_rows(config, name, out)) is not None}
    return BaseSpec(config.model_type, linears, experts, biased, fused)
