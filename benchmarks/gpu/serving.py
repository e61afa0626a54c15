"""A model of real size with random weights, and the engine's own step over it, without requests or HTTP."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from adapters_store.parts import AdapterPackage, ExpertReplacement, LowRank, TensorRef
from adapters_store.ref import AdapterRef
from benchmarks.gpu.measure import Clock, Scale
from server.assembly import assemble
from server.config import EngineConfig
from server.engine.request import Request, Sampling
from server.engine.residency import Wait
from server.engine.scheduler import Scheduled
from server.model.cuda_graphs import GraphedForward
from server.model.experts import RoutedExperts
from server.model.forward import KernelForward
from server.model.inputs import HostStep, lay_out
from server.model.probe import PROBE

GREEDY = Sampling(temperature=0.0)
LOAD_TIMEOUT_S = 60

# by name: model type, real sizes, toy sizes
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "DeepSeek-V2-Lite": (
        "deepseek_v2",
        dict(vocab_size=102400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408,
             num_hidden_layers=27, num_attention_heads=16, num_key_value_heads=16, n_shared_experts=2,
             n_routed_experts=64, routed_scaling_factor=1.0, kv_lora_rank=512, q_lora_rank=None, qk_rope_head_dim=64,
             v_head_dim=128, qk_nope_head_dim=128, topk_method="greedy", num_experts_per_tok=6,
             first_k_dense_replace=1, max_position_embeddings=8192),
        dict(vocab_size=97, hidden_size=32, intermediate_size=40, moe_intermediate_size=24, num_hidden_layers=2,
             num_attention_heads=2, num_key_value_heads=2, n_shared_experts=1, n_routed_experts=8, kv_lora_rank=24,
             q_lora_rank=None, qk_rope_head_dim=8, v_head_dim=8, qk_nope_head_dim=8, topk_method="greedy",
             num_experts_per_tok=2, first_k_dense_replace=1, max_position_embeddings=256),
    ),
    "Llama-3.1-8B": (
        "llama",
        dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
             num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192),
        dict(vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class StepTime:
    """device: of one decode step's work, in seconds. wall: of the runner's whole step, with indices and sampling."""

    device: float
    wall: float


class Serving:
    def __init__(self, name: str, scale: Scale, clock: Clock, **settings: int) -> None:
        self._scale, self._clock, self._rng = scale, clock, random.Random(0)
        self.model = _random_model(name, scale)
        self.weight_bytes = sum(parameter.nbytes for parameter in self.model.parameters())
        config = EngineConfig(model_dir=".", block_size=scale.size(16, 4), **settings)
        self.assembly = assemble(self.model, config, frozenset(), device=scale.device)
        self.residency, self.info = self.assembly.residency, self.assembly.info
        self._adapters: list[AdapterRef] = []
        self.experts = [module for module in self.model.modules() if isinstance(module, RoutedExperts)]

    # -- adapters: on the device, with random weights, without files ---

    def add_esft(self, count: int, experts: int) -> None:
        """Adapters that tune `experts` of each layer, drawn anew."""
        for _ in range(count):
            parts = [
                _expert(module.layer, expert, *module.spec[1:3])
                for module in self.experts
                for expert in self._rng.sample(range(module.spec[0]), experts)
            ]
            slot = self._make_resident("esft", tuple(parts))
            for module in self.experts:
                base = module.spec[0]
                row = module.stacks.expert_map[slot].tolist()
                for place in [place for place in row if place >= base]:
                    module.stacks.gate_up[place].normal_(0, 0.02)
                    module.stacks.down[place].normal_(0, 0.02)

    def add_lora(self, count: int, ranks: Sequence[int], modules: Callable[[str], bool] = lambda _: True) -> None:
        for index in range(count):
            rank = ranks[index % len(ranks)]
            parts = [
                _low_rank(name, rank, shape) for name, shape in self.info.base.linears.items()
                if modules(name) and name != "lm_head"
            ]  # fmt: skip
            slot = self._make_resident("lora", tuple(parts))
            for site in self.residency.sites:
                for weights in site.by_slot.get(slot, []):
                    if weights is not None:
                        weights.a.normal_(0, 0.02)
                        weights.b.normal_(0, 0.02)

    def _make_resident(self, kind: Any, parts: tuple[Any, ...]) -> int:
        ref = AdapterRef(f"adapter-{len(self._adapters)}", f"{len(self._adapters):064x}", kind)
        self._adapters.append(ref)
        self.residency.register(ref, AdapterPackage(kind, ".", ref.revision, (), parts))
        return self.wait_for(ref)

    def wait_for(self, ref: AdapterRef) -> int:
        """Acquire, waiting for the transfer; the pin is kept."""
        deadline = time.monotonic() + LOAD_TIMEOUT_S
        while True:
            slot = self.residency.acquire(ref)
            if time.monotonic() > deadline:
                raise RuntimeError(f"{ref.name} did not load in {LOAD_TIMEOUT_S} s: {self.residency.report()}")
            if slot is Wait.NO_ROOM:
                raise RuntimeError(f"no room for {ref.name}")
            if not isinstance(slot, Wait):
                return slot
            time.sleep(0.001)
            self.residency.poll()

    @property
    def adapter_bytes(self) -> int:
        return sum(on_device.bytes for on_device in self.residency.report())

    # -- steps ---

    def decodes(self, batch: int, context: int, adapters: int) -> list[Scheduled]:
        """A decode of `batch` sequences with `context` tokens each, spread over the base's or the adapters' slots."""
        plan = []
        blocks = -(-context // self._block_size)
        for index in range(batch):
            request = self._request(index, context, blocks)
            request.slot = 1 + index % adapters if adapters else 0
            plan.append(Scheduled(request, context - 1, 1))
        return plan

    def prefill(self, tokens: int) -> list[Scheduled]:
        return [Scheduled(self._request(0, tokens, -(-tokens // self._block_size)), 0, tokens)]

    @property
    def _block_size(self) -> int:
        return self._scale.size(16, 4)

    def _request(self, index: int, length: int, blocks: int) -> Request:
        request = Request(index, [self._rng.randrange(self.info.vocab_size) for _ in range(length)], 1, GREEDY)
        request.block_table = list(range(index * blocks, (index + 1) * blocks))
        if (index + 1) * blocks * self._block_size > self.info.kv_cache_tokens:
            raise RuntimeError(f"{index + 1} sequences of {length} tokens pass {self.info.kv_cache_tokens:,}")
        return request

    def time(self, plan: list[Scheduled], repeats: int = 12) -> StepTime:
        runner = self.assembly.runner
        repeats = self._scale.size(repeats, 1)
        step = lay_out(sorted(plan, key=lambda it: it.request.slot), self.residency, self._block_size)
        with torch.inference_mode():
            runner.run(plan)
            device = sorted(self._clock.events(self._work(step)) for _ in range(repeats))
        wall = []
        for _ in range(repeats):
            start = time.perf_counter()
            runner.run(plan)
            wall.append(time.perf_counter() - start)
        return StepTime(device[len(device) // 2], sorted(wall)[len(wall) // 2])

    def _work(self, step: HostStep) -> Callable[[], object]:
        """The step's work on the device: a graph's replay if it has one, without the laying out of its indices."""
        forward = self.assembly.runner.forward
        if not isinstance(forward, GraphedForward) or not step.is_decode:
            return lambda: forward.logits(step)
        rows = next(size for size in forward.sizes if size >= len(step.token_ids))
        captured = forward.captured(rows, bool(step.spans), step.has_experts)
        if captured is None:
            raise RuntimeError(f"a decode of {rows} rows could not be captured")
        return captured.replay

    def expert_slots(self, plan: list[Scheduled]) -> int:
        """How many (layer, expert slot)s this step reads: what no kernel can avoid."""
        seen: list[int] = []
        hooks = [
            module.register_forward_pre_hook(
                lambda it, arguments: seen.append(len(it.route(arguments[1]).slots.unique()))
            )
            for module in self.experts
        ]
        self.eager(plan)
        for hook in hooks:
            hook.remove()
        return sum(seen)

    def eager(self, plan: list[Scheduled]) -> torch.Tensor:
        """The step's logits, each kernel launched in turn."""
        forward = self.assembly.runner.forward
        eager = forward if isinstance(forward, KernelForward) else forward.eager
        step = lay_out(sorted(plan, key=lambda it: it.request.slot), self.residency, self._block_size)
        with torch.inference_mode():
            return eager.logits(step)

    def floor_bytes(self, plan: list[Scheduled]) -> int:
        """Weights, adapters and KV cache that this step reads at least once."""
        context = sum(len(scheduled.request.tokens) for scheduled in plan)
        kv = context * self.info.kv_cache_bytes // self.info.kv_cache_tokens
        slots = {scheduled.request.slot for scheduled in plan}
        lora = sum(
            weights.a.nbytes + weights.b.nbytes
            for site in self.residency.sites for slot in slots for weights in site.by_slot.get(slot, [])
            if weights is not None
        )  # fmt: skip
        experts = self.expert_slots(plan) * self.expert_bytes if self.experts else 0
        return self.dense_bytes + experts + lora + kv

    @property
    def expert_bytes(self) -> int:
        """Of one expert of one layer."""
        stacks = self.experts[0].stacks
        return stacks.gate_up[0].nbytes + stacks.down[0].nbytes

    @property
    def dense_bytes(self) -> int:
        """Weights that every step reads: all but routed experts and the embedding, of which it reads a few rows."""
        embedding = self.model.get_input_embeddings().weight
        return sum(it.nbytes for it in self.model.parameters() if it is not embedding)


def _random_model(name: str, scale: Scale) -> nn.Module:
    model_type, real, toy = MODELS[name]
    config = CONFIG_MAPPING[model_type](**(toy if scale.is_toy else real), tie_word_embeddings=False)
    torch.manual_seed(0)
    with scale.device:
        dtype = torch.float32 if scale.is_toy else torch.bfloat16
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=PROBE).eval()


def _ref(key: str, *shape: int) -> TensorRef:
    return TensorRef("none", key, shape, "BF16")


def _expert(layer: int, expert: int, hidden: int, inner: int) -> ExpertReplacement:
    key = f"{layer}.{expert}"
    return ExpertReplacement(
        layer, expert, (_ref(f"{key}.gate_up", 2 * inner, hidden),), _ref(f"{key}.down", hidden, inner)
    )


def _low_rank(module: str, rank: int, shape: tuple[int, int]) -> LowRank:
    return LowRank(module, _ref(f"{module}.a", rank, shape[1]), _ref(f"{module}.b", shape[0], rank), 0.1)
