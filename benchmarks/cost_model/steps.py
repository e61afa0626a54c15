"""Seconds of a step on the device, kernel by kernel, and of the bytes that it cannot do without."""

from dataclasses import dataclass, field
from math import ceil

from benchmarks.cost_model.designs import Design
from benchmarks.cost_model.inputs import Chip
from benchmarks.cost_model.shapes import BYTES, Llama, Site, V2Lite

RANK = 16
ROW_TILE = 16  # rows of one adapter that LoRA's kernels compute together in a decode
TUNED = 6  # experts of each layer that an ESFT adapter replaces


@dataclass
class Step:
    """parts: seconds of all layers, by kind."""

    num_bytes: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)

    def add(self, part: str, count: int, seconds: float, num_bytes: float = 0.0) -> None:
        self.parts[part] = self.parts.get(part, 0.0) + count * seconds
        self.num_bytes += count * num_bytes

    @property
    def device(self) -> float:
        return sum(self.parts.values())

    def floor(self, chip: Chip) -> float:
        """What must be read, at the rate of a copy."""
        return self.num_bytes / chip.copy_rate


def llama(design: Design, chip: Chip, batch: int, adapters: int = 0, context: int = 1024, longest: int = 0) -> Step:
    """A decode of sequences of `context` tokens, of which one may have `longest`; adapters of rank 16 on every linear,
    rows in equal parts."""
    model, step = Llama(), Step()
    longest = max(longest, context)
    tokens = (batch - 1) * context + longest
    for site in model.sites:
        step.add("products", model.layers, chip.product(site.num_bytes), site.num_bytes)
    kv = tokens * model.kv_bytes
    # one split where sequences and key heads alone fill the device; by work no program reads more than another
    is_split = design.splits_by_work or batch <= 16
    excess = 0.0 if is_split else (longest - context) * model.kv_bytes / model.key_heads
    step.add("attention", model.layers, chip.attention(kv, chip.attention_least, excess, model.key_heads), kv)
    step.add("small kernels", model.layers, (design.llama - len(model.sites) - 1) * chip.small)
    if adapters:
        tiles = min(adapters, batch) * ceil(batch / min(adapters, batch) / ROW_TILE)
        for site in model.sites:
            lora = min(adapters, batch) * RANK * BYTES * (site.depth * len(site.widths) + sum(site.widths))
            is_normed = sum(site.widths) == model.hidden  # o and down, whose consumer is the next norm
            seconds = (
                in_turn(design, chip, site, tiles)
                if design.expands_in_turn
                else beside(design, chip, site, lora, tiles, is_normed)
            )
            step.add("LoRA", model.layers, seconds, lora)
    step.add("ends", 1, chip.product(model.head_bytes) + design.ends * chip.small, model.head_bytes)
    return step


def in_turn(design: Design, chip: Chip, site: Site, tiles: int) -> float:
    """One launch behind the product: its programs take shrinks, then expands that wait for them, two on a processor."""
    programs, slices = 2 * int(chip.processors), len(site.widths)
    splits = min(8, max(1, site.depth // 512))
    steps = ceil(ceil(site.depth / splits) / 128)  # of 128 numbers, each 1.5 round trips behind the one before
    shrinks = ceil(tiles * slices * splits / programs) * (3 + 1.5 * steps) * chip.round_trip
    blocks = tiles * sum(ceil(width / design.lora_columns) for width in site.widths)
    empty = tiles * slices * ceil(max(site.widths) / design.lora_columns) - blocks
    item, nothing = 6 * chip.round_trip, 1.6 * chip.round_trip
    return shrinks + 3 * chip.round_trip + ceil(blocks / programs) * item + empty / programs * nothing + chip.small


def beside(design: Design, chip: Chip, site: Site, lora_bytes: float, tiles: int, is_normed: bool) -> float:
    """What shrinks on a branch and expands in consumers add. A's bytes share the bandwidth with the base's weights; a
    shrink that takes longer than its product is waited for. B's bytes come on top of the consumer's own, behind three
    loads that wait for one another: the tile, the place of the adapter's weights, the weights. Where rows are normed,
    many programs share one, and the last of them has its tail."""
    b_bytes = lora_bytes * sum(site.widths) / (sum(site.widths) + site.depth * len(site.widths))
    splits = min(8, max(1, site.depth // 512))
    rounds = ceil(tiles * len(site.widths) * splits / (2 * chip.processors))
    shrink = rounds * (3 + 1.5 * ceil(ceil(site.depth / splits) / 128)) * chip.round_trip + chip.small
    product = chip.product(site.num_bytes)
    shared = (lora_bytes - b_bytes) / (chip.product_share * chip.copy_rate)
    # gate and up are one item
    items = (
        tiles * max(site.widths) / design.lora_columns if len(set(site.widths)) == 1 else tiles * sum(site.widths) / 128
    )
    loads = 3 * ceil(items / (design.consumers * chip.processors)) + (design.norm_tail if is_normed else 0)
    expand = b_bytes / (chip.cache_share * chip.copy_rate) + loads * chip.round_trip
    return max(shared, shrink - product) + chip.join + expand


def places_in_use(model: V2Lite, batch: int, adapters: int, share: float) -> float:
    """Distinct experts that the choices of a batch fall on: `share` of an adapter's choices on its tuned experts."""
    of_base = model.choices * (1 - (share if adapters else 0.0)) / model.experts
    base: float = model.experts * (1 - (1 - of_base) ** batch)
    each = model.choices * batch * share / max(1, adapters)
    tuned: float = adapters * TUNED * (1 - (1 - 1 / TUNED) ** each)
    return base + tuned


def v2_lite(
    design: Design,
    chip: Chip,
    batch: int,
    adapters: int = 0,
    share: float = 0.0,
    context: int = 1024,
) -> Step:
    """With ESFT adapters, which send `share` of their choices to the experts that they tune."""
    model, step = V2Lite(), Step()
    attention_sizes = (model.query_and_latent, model.out, model.absorbed, model.absorbed)
    places = places_in_use(model, batch, adapters, share)
    in_stack = places + (model.shared if design.shared_as_experts else 0)
    both = model.layers + 1
    for size in attention_sizes:
        step.add("products", both, chip.product(size * BYTES), size * BYTES)
    kv = batch * context * model.kv_bytes
    step.add("attention", both, chip.attention(kv, chip.latent_least), kv)
    shared = model.shared * model.expert * BYTES
    if not design.shared_as_experts:
        step.add("products", model.layers, chip.product(shared * 2 / 3) + chip.product(shared / 3))
    gate_up = chip.stream(in_stack * model.inner / 64, 2 * 64 * model.hidden * BYTES)
    down = chip.stream(in_stack * model.hidden / 64, 64 * model.inner * BYTES)
    step.add("experts", model.layers, gate_up + down, places * model.expert * BYTES + shared)
    router = model.experts * model.hidden * (BYTES if design.shared_as_experts else 4)
    product = chip.router_loads if design.shared_as_experts else chip.router_product
    step.add("route", model.layers, chip.route + batch * chip.route_row + product, router)
    step.add("small kernels", both, (design.v2 - _large(design)) * chip.small)
    dense = 3 * model.dense_inner * model.hidden * BYTES
    step.add("ends", 1, chip.product(dense) + chip.product(model.head_bytes) + design.ends * chip.small,
             dense + model.head_bytes)  # fmt: skip
    return step


def _large(design: Design) -> int:
    """Launches of a layer that are told apart above: four products, attention, two of experts and the route; before,
    the shared experts' two and the router's too."""
    return 8 if design.shared_as_experts else 11


def sampling(design: Design, chip: Chip, vocab: int) -> float:
    """Of top-p for one row, and of as many more as there are processors for."""
    alone = vocab / design.sampling_programs / chip.logit_rate
    return design.sampling_passes * alone + design.sampling_launches * chip.small
