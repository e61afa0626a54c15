"""What kernels read of a step is what the engine meant, in long random runs with one step in flight.

The simulation's runner knows every token; beside it, the real batches, block tables and inputs lay the same plans out.
"""

import random
from typing import Any

import pytest
import torch

from kernels.adapter_rows import ShapeKey
from server.engine.fake_runner import Known
from server.engine.plan import Plan
from server.engine.request import Request
from server.model.batch import Batch
from server.model.device_inputs import Capacity, DeviceInputs, Sizes
from server.model.inputs import StepInputs
from server.model.sampler import Sampler
from tests.support.simulation import BLOCK, BLOCKS, MOST_RUNNING, simulate
from tests.support.watchful import Watchful

ROWS = 60  # of a padded step


class Tables:
    def shape_key(self, slot: int) -> ShapeKey:
        return ShapeKey(rank=8 if slot else 0)


class LayingOut(Watchful):
    """Lays out each plan before it computes it."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        capacity = Capacity(64, MOST_RUNNING, BLOCKS, slices=1, block_size=BLOCK)
        self._inputs, self._rng = DeviceInputs(capacity, torch.device("cpu")), random.Random(1)
        self._batch: Batch | None = None

    def launch(self, plan: Plan) -> Known:
        before, last = dict(self._chosen), self._batch
        if last is None or not last.goes_on(plan):
            rows, sampler = (last.chosen_rows, last.sampler) if last else ({}, Sampler(()))
            self._batch = Batch(plan, Tables(), BLOCK, rows, sampler)
        else:
            self._counts["batches that went on"] += 1
        assert self._batch is not None
        self._check(self._batch, plan, before)
        step = super().launch(plan)
        self._inputs.last.tokens.fill_(-7)  # nothing of an earlier step is of use
        for row, lane in enumerate(self._batch.lanes):
            self._inputs.last.tokens[row] = self._chosen[lane.request]
        return step

    def _check(self, batch: Batch, plan: Plan, before: dict[Request, int]) -> None:
        step, sizes = batch.step, self._sizes(batch)
        self._inputs.send(step, sizes, step.shape, None if batch.asked else batch.sampler.draws(batch.lengths))
        views = self._inputs.laid_out(sizes, step.shape)
        expected = []
        for it in sorted(plan, key=lambda it: it.lane.slot):
            lane = it.lane
            for position in range(it.start, it.start + it.num_tokens):
                is_known = position < len(lane.tokens)
                token = lane.tokens[position] if is_known else before[lane.request]
                slot = lane.block_table[position // BLOCK] * BLOCK + position % BLOCK
                expected.append((token, position, slot, lane.slot))
        padding = [(0, 0, -1, 0)] * (sizes.rows - len(expected))
        slots = views.rows.slots if views.rows.slots is not None else torch.zeros(sizes.rows)
        rows = torch.stack([views.token_ids, views.positions, views.slot_mapping, slots.int()], 1)
        assert list(map(tuple, rows.tolist())) == expected + padding
        _check_sequences(views, batch)
        fed_back = batch.fed_back(self._inputs.token_ids)
        for row, lane in enumerate(batch.lanes):
            is_fed = fed_back is not None and fed_back.rows[row] >= 0
            assert is_fed == bool(lane.request.num_awaited)

    def _sizes(self, batch: Batch) -> Sizes:
        """As of a graph, mostly."""
        if self._rng.random() < 0.3 or len(batch.step.logit_rows) > MOST_RUNNING:
            return Sizes.of(batch.step)
        if batch.step.is_decode:
            return Sizes(MOST_RUNNING, MOST_RUNNING, MOST_RUNNING, 1)
        return Sizes(ROWS, MOST_RUNNING + 1, MOST_RUNNING, ROWS)


def _check_sequences(views: StepInputs, batch: Batch) -> None:
    attention: Any = views.attention
    for index, it in enumerate(batch.step.block_tables):
        length = int(batch.step.kv_lens[index])
        assert int(attention.kv_lens[index]) == length
        assert attention.block_tables[index, : -(-length // BLOCK)].tolist() == it[: -(-length // BLOCK)]
    assert not attention.kv_lens[len(batch.step.block_tables) :].any()
    if views.rows.cover is not None:
        cover: Any = views.rows.cover
        tiles = cover.tiles[: int(cover.num_tiles)].tolist()
        assert [row for _, first, count in tiles for row in range(first, first + count)] == list(
            range(len(views.token_ids))
        )


@pytest.mark.parametrize("seed", [50, 51])
def test_kernels_read_what_was_planned(seed: int) -> None:
    counts = simulate(1500, seed, overlaps=True, make_runner=LayingOut)
    assert counts["batches that went on"] > 10 and counts["tokens fed back"] > 100
