"""What the model takes for granted about a chip and about how well kernels use it, each with where it is from."""

from dataclasses import dataclass, field, fields, replace
from typing import Any


def _input(value: float, unit: str, source: str) -> Any:
    return field(default=value, metadata={"unit": unit, "source": source})


@dataclass(frozen=True)
class Chip:
    """An H200, unless something else is said."""

    copy_rate: float = _input(
        4.3e12, "B/s", "measured by others on one H200: a copy from device memory to device memory"
    )
    matrix_rate: float = _input(780e12, "FLOP/s", "measured by others on one H200: a large bfloat16 product")
    l2_rate: float = _input(5.5e12, "B/s", "estimated: what all processors together read from the L2 cache")
    processors: float = _input(132, "", "data sheet: streaming multiprocessors")
    lone_rate: float = _input(
        80e9, "B/s", "estimated: one program that streams by itself, two to three times its share"
    )
    round_trip: float = _input(0.3e-6, "s", "estimated: a load that waits for the one before it")
    small: float = _input(2.5e-6, "s", "estimated: a kernel of a graph that waits for the one before and does little")
    gap: float = _input(1.2e-6, "s", "estimated: of that, until its first program runs")
    join: float = _input(0.5e-6, "s", "estimated: where a branch of a graph is waited for as well")
    product_share: float = _input(
        0.85, "", "estimated: of the copy rate, a product of few rows whose weights are read once"
    )
    stream_share: float = _input(0.93, "", "estimated: the same of a grouped product, whose programs stay")
    cache_share: float = _input(0.8, "", "estimated: the same of attention, and of an expand's B in its consumer")
    attention_least: float = _input(5e-6, "s", "estimated: attention over next to no keys")
    latent_least: float = _input(9e-6, "s", "estimated: the same over latents, with one key head and wider tiles")
    prefill_share: float = _input(0.7, "", "estimated: of the matrix rate, cuBLAS with many rows")
    tile_share: float = _input(0.7, "", "estimated: the same of a grouped product that L2 does not hold up")
    attention_share: float = _input(0.45, "", "estimated: the same of attention over a prompt")
    logit_rate: float = _input(16e9, "/s", "estimated: logits that one program looks at in one pass")
    route: float = _input(6.5e-6, "s", "estimated: top-k of a token's experts and the tiles of all, in one launch")
    route_row: float = _input(0.05e-6, "s", "estimated: the same, for each token")
    router_product: float = _input(8e-6, "s", "estimated: the router's product in float32 as a launch of its own")
    router_loads: float = _input(2e-6, "s", "estimated: the same as loads of the route")
    eager_launch: float = _input(56e-6, "s", "measured on a two-core host: a launch that no graph holds, 24 ms for 430")
    replay: float = _input(0.12e-3, "s", "estimated: the host's part that a CPU cannot show: launch, copies, waking")

    @property
    def prefill_rate(self) -> float:
        return self.prefill_share * self.matrix_rate

    # -- kernels ---

    def product(self, num_bytes: float, num_ops: float = 0.0) -> float:
        """Seconds of a dense product whose weights are so many bytes."""
        by_bytes, by_ops = num_bytes / (self.product_share * self.copy_rate), num_ops / self.prefill_rate
        return max(by_bytes, by_ops) + self.small

    def stream(self, items: float, item_bytes: float) -> float:
        """Of a grouped product's items, two programs a processor. What is left for the last round runs at what few
        programs can pull."""
        programs = 2 * self.processors
        rest = items % programs
        seconds = items * item_bytes / (self.stream_share * self.copy_rate)
        alone = item_bytes / self.lone_rate if rest else 0.0
        shared = rest * item_bytes / (self.stream_share * self.copy_rate)
        return seconds - shared + max(shared, alone) + self.small + self.gap

    def attention(self, num_bytes: float, least: float, excess: float = 0.0, programs: int = 0) -> float:
        """excess: bytes that each of a few programs reads alone, when the others are done."""
        together = (num_bytes - excess * programs) / (self.cache_share * self.copy_rate)
        return max(together + excess / self.lone_rate, least) + self.gap

    def tile_rate(self, rows: float, columns: float) -> float:
        """Operations a second of a grouped product by tiles of this size: each reads its rows and its columns anew."""
        from_l2 = self.l2_rate * rows * columns / (rows + columns)
        return min(from_l2, self.tile_share * self.matrix_rate)


H200 = Chip()
# data sheet: 3.35 TB/s, of which as much is reached as of an H200's 4.8
CHIPS = {"H200": H200, "H100": replace(H200, copy_rate=3.0e12, matrix_rate=700e12)}


def provenance(chip: Chip) -> list[str]:
    """A table of every input."""
    lines = ["| input | | where it is from |", "|---|---:|---|"]
    for it in fields(chip):
        value = _readable(getattr(chip, it.name), it.metadata["unit"])
        lines.append(f"| {it.name} | {value} | {it.metadata['source']} |")
    return lines


def _readable(value: float, unit: str) -> str:
    scales = {"B/s": (1e12, "TB/s"), "FLOP/s": (1e12, "TFLOP/s"), "s": (1e-6, "us"), "/s": (1e9, "billion/s")}
    if unit in scales:
        scale, unit = scales[unit]
        value /= scale
    return f"{value:,.4g} {unit}".strip()
