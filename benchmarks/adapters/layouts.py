"""How many bytes ESFT adapters take on a device, by layout: what must be there, padded, merged. Arithmetic only.

Formulas and adapters are those of arXiv 2508.17624, section 2 and table 1: M base experts a layer, N adapters of which
adapter i replaces e_i(l) in layer l, E_max the most that any replaces in any layer.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

Counts = tuple[int, ...]  # tuned experts of one adapter, by MoE layer


class Profile(NamedTuple):
    """What table 1 tells of a real adapter: the most experts that it tunes in a layer, and the average."""

    name: str
    most: int
    average: float


PROFILES = (
    Profile("gate-math", 12, 7.04), Profile("token-math", 9, 6.12), Profile("gate-intent", 12, 9.50),
    Profile("token-intent", 8, 7.12), Profile("gate-summary", 11, 7.73), Profile("token-summary", 8, 5.15),
    Profile("gate-law", 12, 7.35), Profile("token-law", 10, 6.58), Profile("gate-translation", 13, 4.69),
    Profile("token-translation", 6, 3.85),
)  # fmt: skip
_FEWEST = 2  # experts that they tune in any layer


@dataclass(frozen=True)
class Shape:
    """A DeepSeek-V2-Lite, its width divided by `scale`. Layer 0 is dense, the others are mixtures."""

    scale: int = 1
    itemsize: int = 2
    moe_layers: int = 26
    experts: int = 64

    @property
    def hidden(self) -> int:
        return 2048 // self.scale

    @property
    def inner(self) -> int:
        return 1408 // self.scale

    @property
    def expert_bytes(self) -> int:
        return 3 * self.hidden * self.inner * self.itemsize


LITE = Shape()
# of its 31.4 GB in bfloat16 all but the routed experts
LITE_OTHER_BYTES = 2 * 15_706_484_224 - LITE.moe_layers * LITE.experts * LITE.expert_bytes
LITE_KV_BYTES = 27 * (512 + 64) * 2  # of a token: latents and rotated key of every layer


def counts_of(profile: Profile, layers: int, seed: int) -> Counts:
    """Tuned experts by layer with this maximum, and this average as closely as whole experts allow."""
    rng = random.Random(f"{profile.name} {seed}")
    counts = [_FEWEST] * layers
    counts[rng.randrange(layers)] = profile.most
    for _ in range(round(profile.average * layers) - sum(counts)):
        counts[rng.choice([layer for layer, count in enumerate(counts) if count < profile.most])] += 1
    return tuple(counts)


def adapters(number: int, layers: int) -> list[Counts]:
    """The ten of table 1, and from the eleventh on others like them."""
    return [counts_of(PROFILES[index % len(PROFILES)], layers, index // len(PROFILES)) for index in range(number)]


def most_of(tuned: Sequence[Counts]) -> int:
    """E_max."""
    return max(max(counts) for counts in tuned)


def tuned_bytes(shape: Shape, tuned: Sequence[Counts]) -> int:
    """That adapters bring and that no layout saves."""
    return sum(map(sum, tuned)) * shape.expert_bytes


def base_bytes(shape: Shape) -> int:
    """Of the base's routed experts."""
    return shape.moe_layers * shape.experts * shape.expert_bytes


def padded_bytes(shape: Shape, tuned: Sequence[Counts]) -> int:
    """Of the adapters' share of L * (M + N * E_max) experts."""
    return shape.moe_layers * len(tuned) * most_of(tuned) * shape.expert_bytes


def merged_bytes(shape: Shape, tuned: Sequence[Counts], other_bytes: int) -> int:
    """A whole model more for each adapter; the base is served too."""
    return len(tuned) * (base_bytes(shape) + other_bytes)


def fragmentation(shape: Shape, tuned: Sequence[Counts], adapter_bytes: int) -> float:
    """The part by which experts on the device exceed those that must be there: F_mem - 1 of the paper, in per cent."""
    needed = base_bytes(shape) + tuned_bytes(shape, tuned)
    return 100 * ((base_bytes(shape) + adapter_bytes) / needed - 1)


def excess(shape: Shape, tuned: Sequence[Counts], adapter_bytes: int) -> float:
    """The same without the base, which dilutes it: in per cent of the tuned experts' bytes."""
    return 100 * (adapter_bytes / tuned_bytes(shape, tuned) - 1)


def tokens_left(budget: int, taken: int, kv_bytes: int) -> int:
    """Of keys and values, in what models and adapters leave of a budget."""
    return max(0, budget - taken) // kv_bytes
