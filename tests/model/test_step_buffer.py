"""A step's numbers on their way to the device."""

import pytest
import torch

from kernels.adapter_rows import FEW_ROWS, ShapeKey
from server.model.cuda_graphs import batch_sizes
from server.model.device_inputs import Capacity, DeviceInputs, Sizes, padding_step
from server.model.inputs import HostStep, TokenField, host_inputs, integers
from server.model.step_buffer import StepBuffer

CPU = torch.device("cpu")


def test_fields_lie_apart_and_where_they_lay_before() -> None:
    buffer = StepBuffer({"a": 3, "b": 5}, CPU)
    places = buffer.view("a", 3).data_ptr(), buffer.view("b", 5).data_ptr()
    assert all(place % 16 == 0 for place in places)
    for step in range(3):
        buffer.begin()
        buffer.stage("a", [step], count=3, filler=-1)
        buffer.stage("b", [7, 8])
        buffer.stage("b", [9], at=2)
        buffer.send("b", 3)
        assert buffer.view("a", 3).tolist() == [step, -1, -1] and buffer.view("b", 3).tolist() == [7, 8, 9]
        assert (buffer.view("a", 3).data_ptr(), buffer.view("b", 5).data_ptr()) == places


def test_one_side_is_filled_while_the_other_is_copied_from() -> None:
    buffer = StepBuffer({"a": 2}, CPU)
    buffer.begin()
    buffer.stage("a", [1, 2])
    under_way = buffer._sides[0]._memory  # a copy out of this one may not have begun yet
    buffer.begin()
    buffer.stage("a", [3, 4])
    assert under_way[:2].tolist() == [1, 2]
    buffer.send("a", 2)
    assert buffer.view("a", 2).tolist() == [3, 4]


def test_a_field_is_never_filled_beyond_its_end() -> None:
    buffer = StepBuffer({"a": 2, "b": 2}, CPU)
    buffer.begin()
    for values, more in (([1, 2, 3], {}), ([], {"count": 3}), ([1, 2], {"at": 1})):
        with pytest.raises(AssertionError):
            buffer.stage("a", values, **more)
    with pytest.raises(AssertionError):
        buffer.view("a", 3)


# what the ops of a kind of part to come may want to know of each token: here, whether it is a sequence's first
IS_FIRST = TokenField("is_first", lambda step: [int(position == 0) for position in step.positions], filler=-1)


def test_a_table_may_add_a_field_of_its_own_on_both_paths() -> None:
    step = HostStep(
        block_size=16,
        token_ids=integers([5, 6, 7]),
        query_lens=integers([2, 1]),
        kv_lens=integers([2, 10]),
        slots=integers([0, 0]),
        block_tables=[[0], [2, 3]],
        sample_rows=integers([1, 2]),
        logit_rows=integers([1, 2]),
    )
    assert host_inputs(step, torch.float32, [IS_FIRST]).fields["is_first"].tolist() == [1, 0, 0]
    inputs = DeviceInputs(Capacity(tokens=8, sequences=4, blocks=4, slices=1), CPU, [IS_FIRST])
    assert inputs.fill(step, ShapeKey()).fields["is_first"].tolist() == [1, 0, 0]
    sizes = Sizes(4, 4, 4, 1)
    inputs.send(padding_step(16), sizes, ShapeKey())
    assert inputs.laid_out(sizes, ShapeKey()).fields["is_first"].tolist() == [0, -1, -1, -1]


@pytest.mark.parametrize("choices", [1, 4, 8])
@pytest.mark.parametrize("sequences", [1, 4, 64, 300, 512])
def test_lora_in_experts_can_count_itself_at_every_decode(choices: int, sequences: int) -> None:
    """With too few counters it takes a second launch. In the worst case each pair of token and choice is a tile."""
    slices = 2  # gate and up
    inputs = DeviceInputs(Capacity(tokens=1024, sequences=sequences, blocks=1, slices=slices, choices=choices), CPU)
    for rows in batch_sizes(sequences):
        tiles = inputs.views(Sizes(rows, rows, rows, 1), ShapeKey(expert_rank=8), True).rows.tiles
        assert tiles.counters is not None
        assert tiles.counters.numel() > rows * choices * slices and not tiles.counters.any()


@pytest.mark.parametrize("tokens", [1, 16, 511, 512, 513, 4096])
def test_counters_are_as_many_as_few_rows_need(tokens: int) -> None:
    """Prefills of more rows take two launches in any case; so room for them would be wasted."""
    capacity = Capacity(tokens=tokens, sequences=1, blocks=1, slices=2, choices=6)
    counters = DeviceInputs(capacity, CPU).fill(padding_step(16), ShapeKey(expert_rank=8)).rows.tiles.counters
    assert counters is not None and counters.numel() > min(FEW_ROWS, tokens) * 6 * 2
