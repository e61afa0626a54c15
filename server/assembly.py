"""An engine, built and wired: what a step needs, for the model and the device at hand."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from adapters_store.base_spec import BaseSpec, ExpertStack
from kernels import host
from kernels.adapter_rows import ShapeKey
from kernels.compiled import takes_on
from server.config import EngineConfig
from server.device import CPU, choose_target_s, choose_tokens_per_step, chooses_overlap, host_cache_bytes
from server.device_memory import DeviceMemory
from server.engine.checks import Borrowed
from server.engine.kv_cache import KVCache
from server.engine.masks import Masks
from server.engine.messages import EngineInfo, SelfChecked
from server.engine.scheduler import SchedulerLimits
from server.model.build import Build, Injected
from server.model.conv1d import straighten
from server.model.cuda_graphs import CudaCapture, GraphedForward, decode_shapes
from server.model.device_inputs import Capacity, DeviceInputs, padding_step
from server.model.experts import Stacks
from server.model.families import Foreign, fused_rows, max_model_len, pin_rope, settle
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
from server.model.self_check import SelfCheck
from server.model.site_op import SiteOps
from server.model.text_half import type_of
from server.model.warm_up import warm_up
from server.weights.arena import PageWork
from server.weights.choice import choose_arenas, choose_copier
from server.weights.chunks import HostChunks
from server.weights.host_cache import HostCache
from server.weights.loading import Loading
from server.weights.merged import MergedAdapter
from server.weights.residency import DeviceResidency
from server.weights.tables.experts import ExpertTable
from server.weights.tables.lora import LoraTable

log = logging.getLogger("heddle.engine")


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
    masks: Masks
    tables: Tables
    linears: tuple[Made, ...]  # on a CPU: the forms that they are kept in
    info: EngineInfo
    limits: SchedulerLimits


def assemble(
    model: Foreign,
    config: EngineConfig,
    stops: frozenset[int],
    masks: Masks,
    on_progress: OnProgress = lambda *_: None,
    device: torch.device = CPU,
) -> Assembly:
    """Inject our parts into a loaded model, wherever it is, move it to `device` and size its caches."""
    dtype = next(model.parameters()).dtype
    length = max_model_len(model.config, config.max_model_len)
    pin_rope(model, model.config, length)
    settle(model.config)
    straighten(model)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    is_there = next(model.parameters()).device.type == device.type != "cpu"
    arenas = choose_arenas(device)
    memory = DeviceMemory(config, device, arenas, 0 if is_there else num_parameters * dtype.itemsize)
    tables = Tables(
        LoraTable(memory.num_slots, memory.pool, arenas),
        ExpertTable(memory.num_slots, config.max_experts_per_adapter, memory.pool, arenas),
    )
    loading = Loading()
    host_cache = HostCache(HostChunks(host_cache_bytes(config, device), is_pinned=device.type == "cuda"))
    residency = DeviceResidency(
        memory.num_slots, memory.pool, tables, arenas, loading, choose_copier(device), host_cache
    )
    step = CurrentStep()
    site_ops: list[SiteOps] = [LoraOps(tables.lora, step)]
    biased = frozenset(name.rpartition(".")[0] for name, _ in model.named_parameters() if name.endswith("bias"))
    on_progress("Checking", 0, 1)
    probed = probe(model, length)  # before injection: the probe runs the model as Transformers made it
    self_check = SelfCheck(model, probed, length, config.block_size) if config.self_check else None
    packed = _packed_products(model, config) if device.type == "cpu" else None
    make_product = packed.product_of if packed else product_of
    build = Build(model, probed, step, site_ops, lambda *it: Stacks(*tables.experts.add_layer(*it)), make_product)
    injected = inject(build)
    linears = packed.finish(model) if packed else ()
    model.to(device)
    if takes_on(device) or host.takes_on(device, dtype):
        tables.lora.show_kernels(device)
    cache = memory.kv_cache(injected.layers, length, dtype, PageWork.run if device.type == "cpu" else loading.finish)
    limits = _limits(config, device, model.config.vocab_size)
    most_slices = max((len(site.widths) for site in tables.lora.sites), default=1)
    blocks_of_one = min(cache.pool.num_blocks, cache.num_blocks(length))
    choices = max((it.choices for it in injected.experts), default=0)
    capacity = Capacity(
        limits.tokens_per_step, limits.max_running, blocks_of_one, most_slices, choices, config.block_size
    )
    shapes = decode_shapes(config.max_rank, bool(injected.experts))
    fields = [field for ops in site_ops for field in ops.token_fields]
    function = Model(model, step)
    self_checked = None
    if self_check is not None:
        its = Capacity(
            self_check.num_tokens,
            self_check.num_tokens,
            cache.num_blocks(self_check.length),
            most_slices,
            choices,
            config.block_size,
        )
        eager = eager_forward(function, config, its, fields, dtype, device)
        self_checked = _self_checked(self_check, eager, residency, cache)
    forward = choose_forward(function, config, capacity, shapes, fields, dtype, device)
    if isinstance(forward, GraphedForward):
        warm_up(forward, config.block_size, on_progress)
    on_progress("Building the engine", 1, 1)
    info = EngineInfo(
        base=_base_spec(model.config, injected, biased),
        model_type=type_of(model.config),
        num_parameters=num_parameters,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=min(length, cache.capacity),
        vocab_size=model.config.vocab_size,
        kv_cache_tokens=cache.pool.num_blocks * config.block_size,
        kv_cache_bytes=cache.pool.num_blocks * config.block_size * _token_bytes(injected, dtype),
        adapter_bytes=memory.pool.num_pages * memory.pool.page_bytes,
        adapter_slots=memory.num_slots,
        max_experts_per_adapter=tables.experts.e_max,
        stop_token_ids=stops,
        hidden_size=model.config.hidden_size,
        graph_rank=config.max_rank if isinstance(forward, GraphedForward) else None,
        self_checked=self_checked,
    )
    checker = ParityChecker(
        model,
        injected.experts,
        Prefills(forward, residency, config.block_size),
        lambda ref: MergedAdapter(*residency.source(ref)),
        min(limits.tokens_per_step, info.max_model_len),
        info.vocab_size,
    )
    runner = ModelRunner(forward, residency, config.block_size, masks, limits.overlaps)
    return Assembly(cache, runner, residency, checker, masks, tables, linears, info, limits)


def _self_checked(check: SelfCheck, forward: Forward, tables: DeviceResidency, cache: KVCache) -> SelfChecked | None:
    if not cache.pool.make_ready(check.num_blocks):
        log.warning("no self-check: it takes %d KV blocks, and there are fewer", check.num_blocks)
        return None
    with Borrowed(cache, check.num_blocks) as blocks:
        return SelfChecked(*check.compare(forward, tables, blocks))


def _packed_products(model: Foreign, config: EngineConfig) -> PackedProducts:
    times = LinearTimes(cache_directory(), torch.get_num_threads())
    return PackedProducts(FormChooser(config.linear_form, times), model)


def _token_bytes(injected: Injected, dtype: torch.dtype) -> int:
    """Of keys and values in all layers."""
    return sum(layer.shape.elements for layer in injected.layers) * dtype.itemsize


def _limits(config: EngineConfig, device: torch.device, vocab_size: int) -> SchedulerLimits:
    tokens_per_step = choose_tokens_per_step(config, device)
    return SchedulerLimits(
        tokens_per_step,
        config.max_running,
        config.max_waiting,
        config.max_skips,
        vocab_size=vocab_size,
        target_inter_token_s=choose_target_s(config, device),
        overlaps=chooses_overlap(config, device),
    )


def eager_forward(
    model: Model,
    config: EngineConfig,
    capacity: Capacity,
    token_fields: Sequence[TokenField],
    dtype: torch.dtype,
    device: torch.device,
) -> HostForward | KernelForward:
    """The host's kernels or the references on a host; each kernel launched in turn on a GPU."""
    if not takes_on(device):
        return HostForward(model, capacity.sequences, dtype, token_fields)
    return KernelForward(model, DeviceInputs(capacity, device, token_fields))


def choose_forward(
    model: Model,
    config: EngineConfig,
    capacity: Capacity,
    shapes: Sequence[ShapeKey],
    token_fields: Sequence[TokenField],
    dtype: torch.dtype,
    device: torch.device,
) -> Forward:
    """The same, with captured graphs on a GPU."""
    by_kernels = eager_forward(model, config, capacity, token_fields, dtype, device)
    if not isinstance(by_kernels, KernelForward) or device.type != "cuda":
        return by_kernels
    with torch.inference_mode():  # some heads give another type than the model's
        given = by_kernels.compute(padding_step(config.block_size)).logits.dtype
    logits = torch.empty(config.max_running, model.vocab_size, dtype=given, device=device)
    return GraphedForward(by_kernels, logits, shapes, CudaCapture())


def _base_spec(config: Foreign, injected: Injected, biased: frozenset[str]) -> BaseSpec:
    """What adapters are checked against."""
    linears = {target.name: target.shape for target in injected.targets}
    experts = {it.spec.layer: ExpertStack(*it.spec) for it in injected.experts}
    fused = {name: rows for name, (out, _) in linears.items() if (rows := fused_rows(config, name, out)) is not None}
    return BaseSpec(config.model_type, linears, experts, biased, fused)
