"""The oracle: a mixed-adapter batch equals each request alone on the base with its adapter merged into the weights.

Base, LoRA and ESFT requests in the same steps, with chunked prefill, preemption, prefix hits, cancels, and adapters
added and removed meanwhile. The references are computed by Transformers on merged weights, float32 on the CPU.
"""

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters_store import formats, safetensors_file
from adapters_store.rules import Adapter
from server.engine.fake_masks import FakeMasks
from server.engine.request import FinishReason, Sampling
from server.model.forward import Computed
from server.model.probe import PROBE
from tests.support.breadth import always
from tests.support.engine_harness import GREEDY, Answer, Engine, prompts
from tests.support.tiny_adapters import (
    ALL_LINEARS,
    ATTENTION,
    merge,
    register,
    save_esft,
    save_lora,
    write_expert_lora,
    write_lora,
)
from tests.support.tiny_models import make_model, reference

MLA = ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
# DeepSeek's shared experts and dense layer are plain linears, but PEFT takes any target there for the routed experts
SHARED = re.compile(r".*(shared_experts|layers\.0\.mlp)\.(gate|up|down)_proj")
ATTENTION_LINEARS = re.compile(r".*self_attn\.\w+")
TUNED_A = {1: [5, 0, 3], 2: [7], 3: [2, 6]}  # order of relevance, not of id; another number in each layer
TUNED_B = {1: [3], 3: [1, 2, 4, 6]}
NEW_TOKENS = 12
SLOTS = 4  # beside the base

CASES = {
    "llama": (ALL_LINEARS, ("v_proj", "down_proj", "lm_head"), False),
    "phi3": (("qkv_proj", "gate_up_proj"), ("o_proj", "down_proj"), False),
    "qwen3_moe": (ATTENTION, ("q_proj", "v_proj"), True),
    "qwen2_moe-window": (ATTENTION, ("o_proj",), True),
    "deepseek_v2": (MLA, SHARED, True),
    "olmoe": (ATTENTION, ("k_proj",), True),
}


def save_adapters(root: Path, name: str) -> list[Path]:
    model = make_model(name)
    first, second, is_moe = CASES[name]
    paths = [
        save_lora(root / "lora-wide", model, 1, first, rank=8, alpha=16),
        write_lora(root / "lora-rs", model, 2, second, rank=3, alpha=4)
        if isinstance(second, re.Pattern)
        else save_lora(root / "lora-rs", model, 2, second, rank=3, alpha=4, use_rslora=True),
    ]
    paths.append(write_lora(root / "dora", model, 6, ATTENTION_LINEARS, rank=2, alpha=3, dora=True))
    if is_moe:
        paths.append(write_expert_lora(root / "lora-experts", model, 5, rank=3, alpha=5))
        shared = ((1, 2, 3), (2,)) if name.startswith("deepseek") else ((), ())
        paths.append(save_esft(root / "esft-a", model, 3, TUNED_A, shared=shared[0]))
        paths.append(save_esft(root / "esft-b", model, 4, TUNED_B, "", config=False, shards=2, shared=shared[1]))
    return paths


class Oracle:
    """Expected tokens by adapter and prompt; merged models are made once."""

    def __init__(self, name: str, entries: list[Adapter]) -> None:
        self._models = {None: make_model(name)} | {entry.ref: merge(make_model(name), entry) for entry in entries}

    def __call__(self, request: Answer) -> list[int]:
        return reference(self._models[request.adapter], request.prompt, request.max_tokens)


PACKED = [(name, "onednn-packed") for name in ("llama", "qwen3_moe", "deepseek_v2")]


@pytest.mark.parametrize(
    "name, form", always([*((name, "onednn-packed") for name in CASES), ("deepseek_v2", "torch")], *PACKED)
)
def test_mixed_batch_equals_merged_models(name: str, form: str, tmp_path: Path) -> None:
    engine = Engine(make_model(name, attention=PROBE), linear_form=form, adapter_slots=SLOTS)
    entries = [register(engine, path) for path in save_adapters(tmp_path, name)]
    engine.bring_in(entries[:SLOTS])  # one more takes the place of one that has answered
    oracle = Oracle(name, entries)
    choices = [None, *(entry.ref for entry in entries)]
    for index, prompt in enumerate(prompts(10)):
        engine.add(prompt, NEW_TOKENS, choices[index % len(choices)])
    engine.run()
    for request in engine.answers.values():
        assert request.tokens == oracle(request), request.adapter
    assert max(len(slots) for slots in engine.slots_of_steps) == min(len(choices), 1 + SLOTS)
    # and the adapters do something: the same prompt through each gives another answer
    answers = set()
    for choice in choices:
        request = engine.add(prompts(10)[1], NEW_TOKENS, choice)
        engine.run()
        answers.add(tuple(request.tokens))
    assert len(answers) == len(choices)


EVERYTHING = [(name, "off") for name in ("llama", "qwen3_moe", "deepseek_v2", "olmoe")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, overlap", always([*EVERYTHING, ("qwen3_moe", "on"), ("llama", "on")], *EVERYTHING[1:3], ("llama", "on"))
)
def test_the_oracle_holds_under_everything_at_once(name: str, overlap: str, tmp_path: Path) -> None:
    """Memory for a third of what the requests want, two adapter slots for all adapters, and coming and going."""
    rng = random.Random(11)
    engine = Engine(
        make_model(name, attention=PROBE), adapter_slots=2, kv_cache_bytes=_kv_bytes(name, 30), overlap=overlap
    )
    paths = save_adapters(tmp_path, name)
    entries = [register(engine, path) for path in paths]
    late = register(engine, save_lora(tmp_path / "late", make_model(name), 9, CASES[name][0], rank=5))
    engine.remove(late.ref)  # it arrives later
    oracle = Oracle(name, [*entries, late])
    shared = [rng.randrange(3, 199) for _ in range(9)]  # a common beginning: prefix hits
    served = [None, *(entry.ref for entry in entries)]
    cancelled: list[Answer] = []

    def between(step: int) -> None:
        if step < 60 and step % 2 == 0:
            prompt = shared[: rng.choice([0, 9])] + [rng.randrange(3, 199) for _ in range(rng.randrange(1, 20))]
            engine.add(prompt, NEW_TOKENS, rng.choice(served))
        if step == 10:
            engine.register(late.ref, late.package)
            served.append(late.ref)
        if step == 30:  # its requests that are under way finish on it
            engine.remove(entries[0].ref)
            served.remove(entries[0].ref)
        if step in (15, 25, 35):
            victim = rng.choice(engine.scheduler.running or list(engine.scheduler.waiting))
            cancelled.append(engine.answers[victim.id])
            engine.abort(cancelled[-1])

    engine.run(between)
    for request in engine.answers.values():
        if request in cancelled:
            assert request.finish is FinishReason.ABORT
        else:
            assert request.finish is FinishReason.LENGTH
            assert request.tokens == oracle(request), request.adapter
    assert engine.scheduler.num_preemptions > 0
    assert engine.assembly.kv_cache.num_prefix_hits > 0 or overlap == "on"  # a prefix is known a step later then
    assert engine.assembly.kv_cache.pool.num_free == engine.assembly.kv_cache.pool.num_blocks
    assert late.ref in {request.adapter for request in engine.answers.values()}


def test_a_step_in_flight_changes_no_token(tmp_path: Path) -> None:
    """Drawn with penalties of what only the device knows, told of, constrained: as if every token were waited for."""
    samplings = [
        GREEDY, Sampling(seed=1), Sampling(seed=2, repetition=1.5, frequency=0.7, presence=0.4), Sampling(min_tokens=5),
        Sampling(temperature=0.0, repetition=1.8, num_logprobs=2), Sampling(seed=3, top_p=0.8, bias={7: 3.0}),
    ]  # fmt: skip
    found = []
    for overlap in ("off", "on"):
        engine = Engine(make_model("llama", attention=PROBE), masks=FakeMasks(199, most_looks=3), overlap=overlap)
        entries = [register(engine, path) for path in save_adapters(tmp_path / overlap, "llama")[:2]]
        engine.bring_in(entries)
        for index, prompt in enumerate(prompts(12)):
            ref = [None, *(it.ref for it in entries)][index % 3]
            grammar = "grammar" if index % 4 == 3 else None
            stops = frozenset(range(0, 199, 9)) if index % 6 == 3 else frozenset()
            engine.add(prompt, 12, ref, samplings[index % len(samplings)], stops, grammar=grammar)
        engine.run()
        found.append([(it.tokens, it.finish, it.logprobs) for it in engine.answers.values()])
    for (tokens, finish, told), (others, other, its) in zip(*found, strict=True):
        assert (tokens, finish) == (others, other)
        for one, another in zip(told, its, strict=True):
            assert (one is None) == (another is None)
            assert one is None or another is None or one.ids == another.ids


@pytest.mark.parametrize("name", always(["llama", "gemma2", "gpt_oss", "qwen3_moe"], "llama", "qwen3_moe"))
def test_an_adapter_that_overflows_fails_alone(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finite weights can still give infinite keys; those must not reach others by way of reused blocks or padding.

    Verification refuses weights as large as these, and outputs as large as theirs, and the engine relies on neither.
    """
    monkeypatch.setattr(formats, "check_outputs", lambda parts, files: None)
    view, magnitude, _, infinite = safetensors_file._BITS["F32"]
    monkeypatch.setitem(safetensors_file._BITS, "F32", (view, magnitude, infinite - 1, infinite))
    engine = Engine(make_model(name, attention=PROBE), kv_cache_bytes=_kv_bytes(name, 40))
    poison = save_lora(tmp_path / "poison", make_model(name), 1, ATTENTION)
    file = poison / "adapter_model.safetensors"
    save_file({key: tensor * 1e30 for key, tensor in load_file(file).items()}, file)
    entry = register(engine, poison)
    plain = make_model(name)
    expected = {tuple(prompt): reference(plain, prompt, NEW_TOKENS) for prompt in prompts(6)}
    for sampling in (GREEDY, Sampling(temperature=1.0)):
        bad = [engine.add(prompt, NEW_TOKENS, entry.ref, sampling) for prompt in prompts(4)]
        good = [engine.add(prompt, NEW_TOKENS) for prompt in prompts(6)]  # beside it, and then after it
        engine.run()
        good += [engine.add(prompt, NEW_TOKENS) for prompt in prompts(6)]
        engine.run()
        assert all(request.finish is FinishReason.ERROR for request in bad)
        assert "not finite" in str(bad[0].error)
        for request in good:
            assert request.tokens == expected[tuple(request.prompt)]


def _kv_bytes(name: str, blocks: int) -> int:
    info = Engine(make_model(name, attention=PROBE)).assembly.info
    return blocks * 4 * (info.kv_cache_bytes // info.kv_cache_tokens)


@pytest.mark.parametrize("form", ["torch", "onednn", "onednn-packed", "mkl-packed"])
def test_logits_agree_within_float32_rounding(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens could agree by luck; the logits of the first step must agree to 1e-4 of values around 4."""
    name = "deepseek_v2"
    engine = Engine(make_model(name, attention=PROBE), tokens_per_step=512, linear_form=form)
    entries = [register(engine, path) for path in save_adapters(tmp_path, name)]
    seen: list[torch.Tensor] = []
    compute = engine.assembly.runner.forward.compute

    def computing(*step: Any) -> Computed:
        computed = compute(*step)
        seen.append(computed.logits)
        return computed

    monkeypatch.setattr(engine.assembly.runner.forward, "compute", computing)
    prompt = prompts()[1]
    for entry in [None, *entries]:
        seen.clear()
        engine.add(prompt, 1, entry.ref if entry else None)
        engine.run()
        model = merge(make_model(name), entry) if entry else make_model(name)
        with torch.inference_mode():
            expected = model(torch.tensor([prompt])).logits[0, -1]
        torch.testing.assert_close(seen[-1][0], expected, atol=1e-4, rtol=0)
