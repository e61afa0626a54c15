"""What is told beside tokens by kernels and captured decodes, against the references: log-probabilities of prompts and
of tokens, pooled hidden states, and tokens that bias, bans and penalties choose."""

import re
from pathlib import Path

import numpy
import pytest
import torch

from kernels.adapter_rows import ShapeKey
from kernels.compiled import everywhere
from server.engine.plan import Scheduled
from server.engine.request import LaneSpec, Logprobs, OfPrompt, Request, Sampling
from server.model.cuda_graphs import decode_shapes
from server.model.device_inputs import Capacity, DeviceInputs
from server.model.inputs import HostStep, lay_out
from server.model.probe import PROBE
from tests.support.engine_harness import GREEDY, Answer, Engine
from tests.support.stand_ins import PLACE, SMALL, StandIns, stands_in
from tests.support.tiny_adapters import register, write_lora
from tests.support.tiny_models import make_model

ATOL = 1e-4

EDITED = Sampling(temperature=0.0, bias={7: 1.0}, repetition=1.3, presence=0.5, frequency=0.2, min_tokens=2,
                  num_logprobs=2)  # fmt: skip


def ask(engine: Engine, adapter: Path) -> list[Answer]:
    """Of the base and an adapter, together, with prompts that a step cuts and one of a single token."""
    refs = [None, register(engine, adapter).ref]
    answers: list[Answer] = []
    for ref in refs:
        prompt = [5 + 7 * i % 90 for i in range(7)]
        answers.append(engine.add(prompt, 2, ref, Sampling(temperature=0.0, num_logprobs=3), of_prompt=OfPrompt(2)))
        answers.append(engine.add(prompt[3:], 0, ref, of_prompt=OfPrompt(1, "mean")))
        answers.append(engine.add(prompt[:1], 0, ref, of_prompt=OfPrompt(pooling="last")))
        answers.append(engine.add(prompt[:1], 1, ref, GREEDY, of_prompt=OfPrompt(0)))
        answers.append(engine.add(prompt[:4], 3, ref, EDITED, frozenset([7])))
    engine.run()
    return answers


def close(got: Logprobs | None, expected: Logprobs | None) -> None:
    assert got is not None and expected is not None
    assert (got.rank, got.ids) == (expected.rank, expected.ids)
    assert [got.chosen, *got.top] == pytest.approx([expected.chosen, *expected.top], abs=ATOL)


def compare(answers: list[Answer], expected: list[Answer]) -> None:
    for got, wanted in zip(answers, expected, strict=True):
        assert got.error is None and got.tokens == wanted.tokens
        for one, other in zip(got.logprobs, wanted.logprobs, strict=True):
            assert one == other or close(one, other) is None
        if wanted.told is None:
            assert got.told is None
            continue
        assert got.told is not None
        for one, other in zip(got.told.logprobs or [], wanted.told.logprobs or [], strict=True):
            close(one, other)
        vectors = [torch.from_numpy(numpy.frombuffer(it.told.vector or b"", "<f4").copy())
                   for it in (got, wanted) if it.told]  # fmt: skip
        torch.testing.assert_close(*vectors, atol=ATOL, rtol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@stands_in
def test_beside_captured_decodes(tmp_path: Path) -> None:
    """Decodes replay what was captured; steps with a prompt to be told of, or pooled, are launched kernel by kernel."""
    plain = make_model("llama", **SMALL)
    adapter = write_lora(tmp_path / "lora", plain, 1, re.compile(r"model\.layers\.1\.self_attn\.\w+|lm_head"), 3, 6.0)
    sizes = dict(tokens_per_step=16, max_running=6)
    expected = ask(Engine(make_model("llama", attention=PROBE, **SMALL), **sizes), adapter)
    with everywhere():
        engine = Engine(make_model("llama", attention=PROBE, **SMALL), device=PLACE, **sizes)
        graphs = StandIns(engine, [3], decode_shapes(3, False))  # before any adapter came, and batches are padded to it
        captured = graphs.forward.num_captured
        answers = ask(engine, adapter)
    compare(answers, expected)
    assert graphs.num_replays > 0 and graphs.forward.num_captured == captured
    assert answers[4].tokens != answers[9].tokens or answers[0].tokens != answers[5].tokens  # the adapter acts


# -- the lists that a step is computed with ---


class NoTables:
    def shape_key(self, slot: int) -> ShapeKey:
        return ShapeKey(rank=4) if slot else ShapeKey()


def step_of(*lanes: tuple[int, int, OfPrompt | None, int, int]) -> HostStep:
    """lanes: slot, tokens of the prompt, what is asked of it, start and number of those computed."""
    plan = []
    for slot, length, of_prompt, start, count in lanes:
        pools = of_prompt is not None and of_prompt.pooling is not None
        request = Request(0, [LaneSpec([9] * length)], 0 if pools else 3, GREEDY, of_prompt=of_prompt)
        request.first.slot, request.first.block_table = slot, list(range(10))
        plan.append(Scheduled(request.first, start, count, start + count == length))
    return lay_out(plan, NoTables(), 4)


def test_rows_whose_logits_are_wanted() -> None:
    usual = step_of((0, 5, None, 2, 3), (0, 9, None, 0, 4), (2, 6, None, 5, 1))
    assert usual.sample_rows.tolist() == usual.logit_rows.tolist() == [2, 7] and usual.logit_spans == [(1, 2, 2)]
    told = step_of((0, 5, OfPrompt(1), 2, 3), (1, 9, OfPrompt(1), 0, 4), (2, 6, None, 5, 1), (2, 4, OfPrompt(0), 0, 4))
    assert told.logit_rows.tolist() == list(range(12)) and told.sample_rows.tolist() == [2, 7, 11]
    assert told.logit_spans == [(3, 7, 1), (7, 12, 2)]
    pooled = step_of((0, 5, OfPrompt(1, "last"), 2, 3), (1, 3, OfPrompt(pooling="mean"), 0, 3), (2, 6, None, 5, 1))
    assert pooled.logit_rows.tolist() == [0, 1, 6] and pooled.sample_rows.tolist() == [6]
    assert pooled.logit_spans == [(2, 3, 2)]


def test_what_is_pooled_or_told_of_is_no_decode() -> None:
    decode = (0, 5, None, 4, 1)
    assert step_of(decode, decode).is_decode
    assert step_of(decode, (0, 1, OfPrompt(3), 0, 1)).is_decode  # one row, and that one samples
    assert step_of(decode, (0, 5, OfPrompt(3), 2, 1)).is_decode  # one row, of which something is told
    for of_prompt in (OfPrompt(pooling="last"), OfPrompt(pooling="mean"), OfPrompt(3, "last")):
        assert not step_of(decode, (0, 1, of_prompt, 0, 1)).is_decode
        assert not step_of(decode, (0, 5, of_prompt, 4, 1)).is_decode
    assert not step_of(decode, (0, 5, OfPrompt(3), 2, 2)).is_decode


def test_the_buffer_has_room_for_the_logits_of_every_token() -> None:
    inputs = DeviceInputs(Capacity(tokens=40, sequences=4, blocks=10, slices=1, block_size=4), torch.device("cpu"))
    for lanes in ([(1, 30, OfPrompt(0), 0, 20), (2, 30, OfPrompt(0), 0, 20)], [(1, 40, OfPrompt(0), 0, 40)],
                  [(slot, 10, OfPrompt(0), 0, 10) for slot in (1, 2, 3, 4)]):  # fmt: skip
        step = step_of(*lanes)
        filled = inputs.fill(step, step.shape)
        assert filled.logit_rows.tolist() == list(range(40))
        tiles, count = filled.rows.sampled.tiles, filled.rows.sampled.num_tiles
        assert tiles is not None and count is not None
        rows = [row for _, first, size in tiles[: int(count)].tolist() for row in range(first, first + size)]
        assert sorted(rows) == list(range(40)) and int(count) <= len(tiles)
