"""Steps with tokens of prompts: what a prompt takes of the matrix rate, and what decodes beside one wait."""

from typing import NamedTuple

from benchmarks.cost_model.designs import Design
from benchmarks.cost_model.inputs import Chip
from benchmarks.cost_model.shapes import BYTES, Llama, V2Lite
from benchmarks.cost_model.steps import places_in_use

SHARED_IN_STACK = 512  # tokens of a step, beyond which shared experts are a layer of their own


class Prompt(NamedTuple):
    """ops: that the prompt needs. experts: of them and of the seconds, those of the grouped products."""

    ops: float
    seconds: float
    experts_ops: float
    experts_seconds: float

    def share(self, chip: Chip) -> float:
        return self.ops / self.seconds / chip.matrix_rate

    def experts_share(self, chip: Chip) -> float:
        return self.experts_ops / self.experts_seconds / chip.matrix_rate


def v2_lite(design: Design, chip: Chip, tokens: int) -> Prompt:
    """A prompt of DeepSeek-V2-Lite by itself. Every expert has its rows, padded to tiles: half a tile too many."""
    model = V2Lite()
    both = model.layers + 1
    shared_ops = 2 * tokens * model.layers * model.shared * model.expert
    routed_ops = 2 * tokens * model.layers * model.choices * model.expert
    dense_ops = 2 * tokens * (both * model.attention_numbers + 3 * model.dense_inner * model.hidden)
    pairs_ops = tokens**2 * model.heads * (model.nope + model.rope + model.value) * both
    head_ops = 2 * model.vocab * model.hidden
    rows, columns = design.tile
    each = tokens * model.choices / model.experts
    grouped = routed_ops * (each + rows / 2) / each
    experts_ops = routed_ops
    in_stack = design.shared_as_experts and tokens <= SHARED_IN_STACK
    if in_stack:
        grouped, experts_ops = grouped + shared_ops, routed_ops + shared_ops
    experts = grouped / chip.tile_rate(rows, columns)
    absorbed = (2 * model.latent + model.rope) / (model.nope + model.rope + model.value)
    pairs = pairs_ops * (1 if design.expands_latents else absorbed) / (chip.attention_share * chip.matrix_rate)
    dense = (dense_ops + (0 if in_stack else shared_ops)) / chip.prefill_rate
    small = both * (design.v2 + (3 if design.shared_as_experts and not in_stack else 0)) * chip.small + chip.product(
        model.head_bytes
    )
    ops = routed_ops + shared_ops + dense_ops + pairs_ops + head_ops
    return Prompt(ops, experts + dense + pairs + small, experts_ops, experts)


class Mixed(NamedTuple):
    device: float
    host: float  # of launching it kernel by kernel; 0 where a graph holds it

    @property
    def wall(self) -> float:
        return max(self.device, self.host)


def mixed_llama(design: Design, chip: Chip, tokens: int, decodes: int = 31, context: int = 1024) -> Mixed:
    """A step of so many tokens, of which all but the decodes are one prompt's."""
    model = Llama()
    products = sum(chip.product(it.num_bytes, tokens * it.num_bytes) for it in model.sites)  # 2 operations, 2 bytes
    kv = (decodes * context + tokens) * model.kv_bytes
    layer = products + chip.attention(kv, 2 * chip.attention_least)
    layer += (design.llama - len(model.sites) - 1) * chip.small
    device = model.layers * layer + chip.product(model.head_bytes) + design.ends * chip.small
    return Mixed(device, _host(design, chip, tokens, model.layers * design.llama + design.ends))


def mixed_v2_lite(design: Design, chip: Chip, tokens: int, decodes: int = 31, context: int = 1024) -> Mixed:
    model = V2Lite()
    numbers = (model.query_and_latent, model.out, model.absorbed, model.absorbed)
    layer = sum(chip.product(it * BYTES, 2 * it * tokens) for it in numbers)
    layer += chip.attention((decodes * context + tokens) * model.kv_bytes, 2 * chip.latent_least)
    places = places_in_use(model, tokens, 0, 0.0) + model.shared
    layer += chip.stream(places * model.expert / (64 * model.hidden), 64 * model.hidden * BYTES)
    layer += (design.v2 - 7) * chip.small + chip.route + tokens * chip.route_row
    dense = 3 * model.dense_inner * model.hidden
    ends = chip.product(dense * BYTES, 2 * dense * tokens) + chip.product(model.head_bytes) + design.ends * chip.small
    both = model.layers + 1
    return Mixed(both * layer + ends, _host(design, chip, tokens, both * design.v2 + design.ends))


def _host(design: Design, chip: Chip, tokens: int, launches: int) -> float:
    return 0.0 if tokens <= design.captured_tokens else launches * chip.eager_launch
