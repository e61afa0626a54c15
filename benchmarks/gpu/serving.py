"""A model of real size with random weights, and the engine's own step over it, without requests or HTTP."""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from adapters_store.parts import AdapterPackage, ExpertReplacement, LowRank, TensorRef
from adapters_store.ref import AdapterRef
from benchmarks.gpu import shapes
from benchmarks.gpu.measure import Bench, Scale
from benchmarks.gpu.report import Row
from server.assembly import Assembly, assemble
from server.config import EngineConfig
from server.engine.fake_masks import FakeMasks
from server.engine.plan import Scheduled
from server.engine.request import Lane, LaneSpec, Request, Sampling
from server.engine.residency import Wait
from server.model.cuda_graphs import Capture, GraphedForward, decode_shapes
from server.model.experts import RoutedExperts
from server.model.families import Foreign
from server.model.forward import KernelForward
from server.model.inputs import HostStep, lay_out
from server.model.probe import PROBE
from server.model.warm_up import warm_up
from server.weights.arena import PageWork
from server.weights.choice import choose_arenas
from server.weights.loading import Job, Loading
from server.weights.padded_arena import PaddedArenas
from server.weights.tables.table import Prepared
from server.weights.transfer import Transfer

GREEDY = Sampling(temperature=0.0)
LOAD_TIMEOUT_S = 60
NO_FILE = "none"


@dataclass(frozen=True)
class StepTime:
    """device: of one decode step's work, in seconds. wall: of the runner's whole step, with indices and sampling."""

    device: float
    wall: float


@dataclass(frozen=True)
class Picks:
    """Of one step: how many expert places it reads in all layers, and the share of choices that fell on adapters'."""

    places: int
    tuned: float


class Serving:
    """layers: of the model's, 0 for all of them. settings: of EngineConfig."""

    def __init__(self, name: str, bench: Bench, layers: int = 0, **settings: int) -> None:
        self._scale, self._clock, self._rng = bench.scale, bench.clock, random.Random(0)
        start = time.perf_counter()
        self.model = _random_model(name, bench.scale, layers)
        made = time.perf_counter()
        self.weight_bytes = sum(parameter.nbytes for parameter in self.model.parameters())
        self._dense = dense_numbers(self.model)
        config = EngineConfig(model_dir=".", block_size=self.block_size, **settings)
        self.assembly = assemble(self.model, config, frozenset(), FakeMasks(), device=bench.scale.device)
        self.residency, self.info = self.assembly.residency, self.assembly.info
        self.residency._loading = _Unfilled(self.residency._loading)  # type: ignore[assignment]
        pool = self.assembly.kv_cache.pool
        if not pool.make_ready(pool.num_blocks):  # lanes here name blocks by number
            raise RuntimeError(f"there is no memory for all {pool.num_blocks:,} KV blocks")
        self._adapters: list[AdapterRef] = []
        self.experts = [module for module in self.model.modules() if isinstance(module, RoutedExperts)]
        if not bench.scale.is_cuda:
            replayed(self.assembly, config, self._clock.captured)
        self._fill_caches()
        wanted = shapes.MODELS[name][2 if bench.scale.is_toy else 1]["num_hidden_layers"]
        self.started: Row = {
            "case": "start", "layers": f"{self.model.config.num_hidden_layers} of {wanted}",
            "weight bytes": self.weight_bytes, "KV bytes": self.info.kv_cache_bytes,
            "adapter bytes": self.info.adapter_bytes, "model s": made - start, "engine s": time.perf_counter() - made,
            "graphs": self.graphs.num_captured, "memory": _kind_of_memory(bench.scale.device),
        }  # fmt: skip

    def _fill_caches(self) -> None:
        """What requests before would have left: zeros take less power to read."""
        for module in self.model.modules():
            for tensor in vars(getattr(module, "cached_layer", object)).values():
                if isinstance(tensor, torch.Tensor):
                    tensor.normal_()

    @property
    def graphs(self) -> GraphedForward:
        forward = self.assembly.runner.forward
        assert isinstance(forward, GraphedForward)
        return forward

    # -- adapters: on the device, with random weights, without files ---

    def add_esft(self, count: int, tuned: Mapping[int, Sequence[int]]) -> None:
        """Adapters that tune these experts, by layer."""
        for _ in range(count):
            parts = [
                _expert(module.spec.layer, expert, *module.spec[1:3])
                for module in self.experts
                for expert in tuned[module.spec.layer]
            ]
            slot = self._make_resident("esft", tuple(parts))
            for module in self.experts:
                base = module.spec.num_experts + module.spec.num_shared
                for place in [place for place in module.stacks.expert_map[slot].tolist() if place >= base]:
                    module.stacks.gate_up[place].normal_(0, 0.02)
                    module.stacks.down[place].normal_(0, 0.02)

    def favour(self, tuned: Mapping[int, Sequence[int]], factor: float) -> None:
        """Scale the router's rows of these experts. If by much, half of the tokens rank each of them above all others,
        and the others last."""
        for module in self.experts:
            module.router.weight.data[list(tuned[module.spec.layer])] *= factor

    def add_lora(self, count: int, ranks: Sequence[int]) -> None:
        for index in range(count):
            rank = ranks[index % len(ranks)]
            parts = [
                _low_rank(name, rank, shape) for name, shape in self.info.base.linears.items()
                if name != "lm_head"
            ]  # fmt: skip
            slot = self._make_resident("lora", tuple(parts))
            for adapters in self.assembly.tables.lora.sites.values():
                for weights in adapters.by_slot.get(slot, []):
                    if weights is not None:
                        weights.a.normal_(0, 0.02)
                        weights.b.normal_(0, 0.02)

    def _make_resident(self, kind: Any, parts: tuple[Any, ...]) -> int:
        ref = AdapterRef(f"adapter-{len(self._adapters)}", f"{len(self._adapters):064x}", kind)
        self._adapters.append(ref)
        self.residency.register(ref, AdapterPackage(kind, ref.revision, (), parts))
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
        blocks = -(-context // self.block_size)
        for index in range(batch):
            lane = self._lane(index, context, index * blocks)
            lane.slot = 1 + index % adapters if adapters else 0
            plan.append(Scheduled(lane, context - 1, 1, samples=True))
        return plan

    def prefill(self, tokens: int, slot: int = 0) -> list[Scheduled]:
        return self._prefill(tokens, 0, slot)

    def mixed(self, batch: int, context: int, tokens: int, adapters: int) -> list[Scheduled]:
        """Decodes, and a prompt of `tokens` beside them."""
        decodes = self.decodes(batch, context, adapters)
        return decodes + self._prefill(tokens, batch * -(-context // self.block_size), 1 if adapters else 0)

    def _prefill(self, tokens: int, first_block: int, slot: int) -> list[Scheduled]:
        lane = self._lane(1 << 20, tokens, first_block)
        lane.slot = slot
        return [Scheduled(lane, 0, tokens, samples=True)]

    @property
    def block_size(self) -> int:
        return self._scale.size(16, 4)

    def _lane(self, number: int, length: int, first_block: int) -> Lane:
        prompt = [self._rng.randrange(self.info.vocab_size) for _ in range(length)]
        lane = Request(number, [LaneSpec(prompt)], 1, GREEDY).first
        lane.block_table = [first_block + index for index in range(-(-length // self.block_size))]
        if (lane.block_table[-1] + 1) * self.block_size > self.info.kv_cache_tokens:
            raise RuntimeError(f"block {lane.block_table[-1]} passes the cache's {self.info.kv_cache_tokens:,} tokens")
        return lane

    def time(self, plan: list[Scheduled], repeats: int = 12) -> StepTime:
        runner = self.assembly.runner
        repeats = self._scale.size(repeats, 1)
        with torch.inference_mode():
            runner.launch(plan).outputs()
            work = self.work(plan)
            device = sorted(self._clock.events(work) for _ in range(repeats))
        wall = []
        for _ in range(repeats):
            start = time.perf_counter()
            runner.launch(plan).outputs()
            wall.append(time.perf_counter() - start)
        return StepTime(device[len(device) // 2], sorted(wall)[len(wall) // 2])

    def work(self, plan: list[Scheduled]) -> Callable[[], object]:
        """The step's work on the device: a graph's replay if it has one, over the indices of the step that ran last."""
        step = self._lay_out(plan)
        key = self.graphs.key(step)
        return self.graphs.replay(key) if key is not None else lambda: self.graphs.compute(step)

    def is_captured(self, plan: list[Scheduled]) -> bool:
        return self.graphs.key(self._lay_out(plan)) is not None

    def _lay_out(self, plan: list[Scheduled]) -> HostStep:
        return lay_out(sorted(plan, key=lambda it: it.lane.slot), self.residency, self.block_size)

    def picks(self, plan: list[Scheduled]) -> Picks:
        if not self.experts:
            return Picks(0, 0.0)
        seen: list[Picks] = []

        def note(module: RoutedExperts, arguments: tuple[torch.Tensor, ...]) -> None:
            places = module.route(arguments[1]).places
            seen.append(Picks(len(places.unique()), float((places >= module.spec[0]).float().mean())))

        hooks = [module.register_forward_pre_hook(note) for module in self.experts]
        self.eager(plan)
        for hook in hooks:
            hook.remove()
        return Picks(sum(it.places for it in seen), sum(it.tuned for it in seen) / len(seen))

    def eager(self, plan: list[Scheduled]) -> torch.Tensor:
        """The step's logits, each kernel launched in turn."""
        with torch.inference_mode():
            return self.graphs.eager.compute(self._lay_out(plan)).logits

    def floor_bytes(self, plan: list[Scheduled], picks: Picks) -> int:
        """Weights, adapters and KV cache that this step reads at least once."""
        context = sum(len(scheduled.lane.tokens) for scheduled in plan)
        kv = context * self.info.kv_cache_bytes // self.info.kv_cache_tokens
        slots = {scheduled.lane.slot for scheduled in plan}
        lora = sum(
            weights.a.nbytes + weights.b.nbytes
            for adapters in self.assembly.tables.lora.sites.values()
            for slot in slots for weights in adapters.by_slot.get(slot, [])
            if weights is not None
        )  # fmt: skip
        experts = picks.places * self.expert_bytes if self.experts else 0
        return self.dense_bytes + experts + lora + kv

    @property
    def expert_bytes(self) -> int:
        """Of one expert of one layer."""
        stacks = self.experts[0].stacks
        return stacks.gate_up[0].nbytes + stacks.down[0].nbytes

    @property
    def dense_bytes(self) -> int:
        """Weights that every step reads."""
        return self._dense * self._scale.dtype.itemsize

    def prefill_ops(self, tokens: int) -> int:
        """Multiplications and additions of a prompt: every weight once a token, the logits once, half of all pairs."""
        head = self.info.vocab_size * self.model.config.hidden_size
        experts = sum(
            module.stacks.gate_up[0].numel() + module.stacks.down[0].numel() for module in self.experts
        ) * (self.model.config.num_experts_per_tok if self.experts else 0)  # fmt: skip
        weights = self._dense - head + experts
        config = self.model.config
        width = self.model.config.num_attention_heads * (
            config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
            if hasattr(config, "kv_lora_rank") else 2 * config.hidden_size // config.num_attention_heads
        )  # fmt: skip
        return 2 * tokens * weights + 2 * head + tokens**2 * width * config.num_hidden_layers


def dense_numbers(model: Foreign) -> int:
    """Of a model as Transformers made it: all but routed experts, and the embedding, of which a step reads a few rows.
    Afterwards it is too late: products that modules share are in none of them."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    parts = [it for name, it in model.named_parameters() if ".experts." not in name and it is not embedding]
    return sum(it.numel() for it in parts) + (head.numel() if head is embedding else 0)


def replayed(assembly: Assembly, config: EngineConfig, capture: Capture) -> None:
    """So that all that is not CUDA's is run without a GPU: capture gives what stands in for a graph's replay."""
    eager = assembly.runner.forward
    assert isinstance(eager, KernelForward)
    logits = torch.empty(config.max_running, assembly.info.vocab_size)
    shapes = decode_shapes(config.max_rank, bool(assembly.info.base.experts))
    forward = GraphedForward(eager, logits, shapes, capture)
    warm_up(forward, config.block_size, lambda *_: None)
    assembly.runner.forward = forward


class _Unfilled:
    """Loading of adapters that no file holds: their pages are mapped, and nothing is copied there."""

    def __init__(self, loading: Loading) -> None:
        self._loading = loading

    def start(self, job: Job) -> None:
        if isinstance(job, Transfer):
            job._tables = [partial(_without_places, prepare) for prepare in job._tables]
        self._loading.start(job)

    def do(self, work: PageWork) -> None:
        self._loading.do(work)


def _without_places(prepare: Callable[[], Prepared]) -> Prepared:
    """Nothing of what no file holds is copied, or checked before it is filled."""
    prepared = prepare()
    places = [(tensor, place) for tensor, place in prepared.places if tensor.file != NO_FILE]
    return prepared._replace(places=places, checked=())


def _random_model(name: str, scale: Scale, layers: int) -> Foreign:
    model_type, real, toy = shapes.MODELS[name]
    sizes = dict(toy if scale.is_toy else real)
    sizes["num_hidden_layers"] = layers or sizes["num_hidden_layers"]
    config = CONFIG_MAPPING[model_type](**sizes, tie_word_embeddings=False)
    torch.manual_seed(0)
    with scale.device:
        return AutoModelForCausalLM.from_config(config, dtype=scale.dtype, attn_implementation=PROBE).eval()


def _kind_of_memory(device: torch.device) -> str:
    return "padded" if isinstance(choose_arenas(device), PaddedArenas) else "virtual"


def _ref(key: str, *shape: int) -> TensorRef:
    return TensorRef(NO_FILE, key, shape, "BF16")


def _expert(layer: int, expert: int, hidden: int, inner: int) -> ExpertReplacement:
    key = f"{layer}.{expert}"
    return ExpertReplacement(
        layer, expert, (_ref(f"{key}.gate_up", 2 * inner, hidden),), _ref(f"{key}.down", hidden, inner)
    )


def _low_rank(module: str, rank: int, shape: tuple[int, int]) -> LowRank:
    return LowRank(module, _ref(f"{module}.a", rank, shape[1]), _ref(f"{module}.b", shape[0], rank), 0.1)
