"""What changed, in numbers: the step as it was at adde248, and as it is."""

from dataclasses import dataclass
from pathlib import Path

HOST_PAGE = Path(__file__).parents[1] / "results" / "host_step.md"


@dataclass(frozen=True)
class Design:
    """Launches are a layer's, as the dispatch trace counts them (benchmarks.launches)."""

    name: str
    llama: int
    llama_lora: int  # of them, with LoRA everywhere
    critical: int  # of those, the ones that wait for one another
    v2: int
    ends: int  # a step's launches outside its layers
    # LoRA: one launch a site behind its product, which waits for itself; or shrinks beside the products, and expands in
    # what reads them
    expands_in_turn: bool
    lora_columns: int  # of an expand's item
    consumers: int  # programs on a processor that expand: what their registers leave room for (results/kernels_aot.md)
    norm_tail: int  # loads one behind another by which the last program norms a row that many have added to
    shared_as_experts: bool  # shared experts are always-chosen places of the grouped product
    splits_by_work: bool  # attention's splits are shared out by keys, not by sequences
    tile: tuple[int, int]  # rows and columns of a grouped product's tile at prefill; gate and up are columns
    expands_latents: bool  # a prompt's keys and values are expanded; else its queries are absorbed
    overlaps: bool  # one step is in flight
    captured_tokens: int  # the largest step with prompt tokens that a graph holds
    sampling_passes: float  # over a row of logits, for top-p
    sampling_programs: int  # of one row
    sampling_launches: int
    host: int  # which row of results/host_step.md: 0 the first, -1 the last


BEFORE = Design(
    "before", llama=13, llama_lora=17, critical=17, v2=26, ends=14, expands_in_turn=True, lora_columns=64,
    consumers=0, norm_tail=0, shared_as_experts=False, splits_by_work=False, tile=(64, 128), expands_latents=False,
    overlaps=False, captured_tokens=0, sampling_passes=31, sampling_programs=1, sampling_launches=1, host=0,
)  # fmt: skip
AFTER = Design(
    "after", llama=9, llama_lora=13, critical=9, v2=12, ends=15, expands_in_turn=False, lora_columns=128,
    consumers=2, norm_tail=6, shared_as_experts=True, splits_by_work=True, tile=(128, 256), expands_latents=True,
    overlaps=True, captured_tokens=512, sampling_passes=2.5, sampling_programs=16, sampling_launches=3, host=-1,
)  # fmt: skip


def host_seconds(design: Design, running: int, page: str | None = None) -> float:
    """Of the engine's thread for a greedy step (results/host_step.md), on a line between what was measured."""
    lines = (page or HOST_PAGE.read_text()).splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if " greedy " in line]
    name = rows[design.host][0]
    points = [(int(row[1]), float(row[3].replace(",", "")) * 1e-6) for row in rows if row[0] == name]
    (low, a), (high, b) = points[:2] if running <= points[1][0] else points[-2:]
    return a + (b - a) * (running - low) / (high - low)
