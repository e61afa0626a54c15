"""Prompts over latents (MLA): where it is less work, their keys and values are expanded for the length of one layer.

Absorbed attention reads one latent for all heads, which is what decodes want. With many queries products decide, and in
the latent space those are long. Of one head and layer, with n new tokens and c keys, of which they see P pairs:

    absorbed    P * (2 * latent + rotary)       + n * latent * (key + value)      queries in, results out
    expanded    P * (key + rotary + value)      + c * latent * (key + value)      keys and values out of latents

For DeepSeek-V2-Lite that is 1,088 P against 320 P: a prompt is less work expanded from a hundred tokens on, and a piece
of 512 of one whatever came before it.

What is expanded lies in a cache of its own, block by block in the order of the sequences, and is attended to there with
as many key heads as there are heads. Decodes of the same step stay absorbed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.paged_attention import DeviceBatch
from server.model.copies import to_device

LEAST_TOKENS = 65  # new ones of a sequence; with fewer, launches are what takes time
MARGIN = 1.2  # what is expanded is written, and read once more
MOST_BYTES = 256 << 20  # of what is expanded at once, in one layer
_ALIGNED = 4  # integers: kernels are compiled for addresses that are multiples of 16 bytes


class LatentSizes(NamedTuple):
    """Of a layer: heads, and elements of latents and of a head's parts."""

    heads: int
    latent: int
    rotary: int
    key: int
    value: int


class Some(NamedTuple):
    """Some sequences of a step. rows [n]: theirs among the step's, in order. The batch speaks of those alone."""

    rows: Tensor
    batch: DeviceBatch


class ExpandedStep(NamedTuple):
    """Whose keys are expanded. blocks [B]: of the cache, those of one such sequence after another's; `expanded` has
    them by their place in that list. absorbed: the other sequences; None: there are none."""

    blocks: Tensor
    expanded: Some
    absorbed: Some | None


class _Listed(NamedTuple):
    """Some sequences, as lists: what a batch is made of, and their rows."""

    rows: list[int]
    query_starts: list[int]
    kv_lens: list[int]
    longest: int


@dataclass(frozen=True)
class HostSequences:
    """The sequences of a step that is launched kernel by kernel, as AttentionBatch has them; a step that is captured
    has none. Layers of the same sizes share a plan."""

    query_lens: Sequence[int]
    kv_lens: Sequence[int]
    block_tables: Sequence[Sequence[int]]
    _plans: dict[LatentSizes, ExpandedStep | None] = field(default_factory=dict)

    def expanded(
        self, sizes: LatentSizes, batch: DeviceBatch, block_size: int, element_size: int
    ) -> ExpandedStep | None:
        """batch: of all of them. None: no sequence is worth it."""
        if sizes not in self._plans:
            chosen = self._chosen(sizes, block_size, element_size)
            self._plans[sizes] = self._plan(chosen, batch, block_size) if chosen else None
        return self._plans[sizes]

    def _chosen(self, sizes: LatentSizes, block_size: int, element_size: int) -> list[int]:
        room = MOST_BYTES // (element_size * sizes.heads * (2 * sizes.key + sizes.rotary + sizes.value))
        chosen = []
        for index, (new, keys) in enumerate(zip(self.query_lens, self.kv_lens, strict=True)):
            padded = -(-keys // block_size) * block_size
            if padded <= room and is_less_expanded(int(new), int(keys), sizes):
                chosen.append(index)
                room -= padded
        return chosen

    def _plan(self, chosen: Sequence[int], batch: DeviceBatch, block_size: int) -> ExpandedStep:
        others = sorted(set(range(len(self.query_lens))) - set(chosen))
        tables = [self.block_tables[it][: -(-self.kv_lens[it] // block_size)] for it in chosen]
        places, width = [0, *accumulate(map(len, tables))], max(map(len, tables))
        identity = ([*range(first, end), *[0] * (width - end + first)] for first, end in pairwise(places))
        own, its = self._listed(chosen), self._listed(others)
        blocks, table, other, rows, starts, kv_lens, its_rows, its_starts, its_kv_lens = _sent(
            [chain(*tables), chain(*identity), others, *own[:3], *its[:3]], batch.kv_lens.device
        )
        # as wide as the step's own: kernels are compiled for what tables have room for
        own_tables = batch.block_tables.new_zeros(len(chosen), max(width, batch.block_tables.shape[1]))
        own_tables[:, :width].copy_(table.view(len(chosen), width))
        expanded = DeviceBatch(starts, kv_lens, own_tables, batch.counters, own.longest)
        if not others:
            return ExpandedStep(blocks, Some(rows.long(), expanded), None)
        its_tables = batch.block_tables.index_select(0, other)
        absorbed = DeviceBatch(its_starts, its_kv_lens, its_tables, batch.counters, its.longest)
        return ExpandedStep(blocks, Some(rows.long(), expanded), Some(its_rows.long(), absorbed))

    def _listed(self, some: Sequence[int]) -> _Listed:
        starts = [0, *accumulate(map(int, self.query_lens))]
        lengths = [int(self.query_lens[it]) for it in some]
        rows = chain(*(range(starts[it], starts[it + 1]) for it in some))
        kv_lens = [int(self.kv_lens[it]) for it in some]
        return _Listed(list(rows), [0, *accumulate(lengths)], kv_lens, max(lengths, default=0))


def is_less_expanded(new: int, keys: int, sizes: LatentSizes) -> bool:
    """Whether the keys of a sequence are worth expanding, by the products above. Padding has no keys."""
    pairs = new * (keys - new) + new * (new + 1) // 2
    projected = sizes.latent * (sizes.key + sizes.value)
    absorbed = pairs * (2 * sizes.latent + sizes.rotary) + new * projected
    expanded = pairs * (sizes.key + sizes.rotary + sizes.value) + keys * projected
    return keys >= new >= LEAST_TOKENS and expanded * MARGIN < absorbed


def _sent(fields: Iterable[Iterable[int]], device: torch.device) -> list[Tensor]:
    """Each as a tensor of its own on the device, in one copy."""
    whole: list[int] = []
    places: list[slice] = []
    for it in map(list, fields):
        places.append(slice(len(whole), len(whole) + len(it)))
        whole += [*it, *[0] * (-len(it) % _ALIGNED)]
    sent = to_device(whole, torch.int32, device)
    return [sent[place] for place in places]
