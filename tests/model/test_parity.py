"""An adapter's logits through the hot path, against those with merged weights: equal, and different where they must be.

The merging itself is held to the tests' own (tiny_adapters.merge) and Transformers, so that two mistakes cannot agree.
"""

import random
import re
import struct
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adapters_store import formats, safetensors_file
from adapters_store.parts import AdapterPackage
from adapters_store.ref import AdapterRef
from adapters_store.rules import Adapter
from kernels.adapter_rows import ShapeKey
from kernels.lora import table_rows
from server.engine.messages import AdapterChecked
from server.model.experts import RoutedExperts
from server.model.forward import HostForward, Model
from server.model.linears import AdaptedLinear
from server.model.merged import merged_into
from server.model.probe import PROBE
from server.weights.merged import MergedAdapter
from tests.support.engine_harness import Engine, prompts
from tests.support.stepped_residency import wait_until_resident
from tests.support.tiny_adapters import (
    ATTENTION,
    merge,
    register,
    save_esft,
    save_lora,
    write_expert_lora,
    write_lora,
)
from tests.support.tiny_models import VOCAB, make_model, reference
from tests.support.waiting import eventually

EVERYWHERE = re.compile(r".*self_attn\.\w+|.*\.(gate|up|down)_proj|lm_head")
ATTENTION_LINEARS = re.compile(r".*self_attn\.\w+")
TUNED = {1: [5, 0, 3], 2: [7], 3: [2, 6]}

Make = Callable[[Path, nn.Module], Path]
KINDS: dict[str, Make] = {
    "lora": lambda path, model: write_lora(path, model, 1, EVERYWHERE, 6, 12.0),
    "rslora": lambda path, model: save_lora(path, model, 2, ATTENTION[:1] + ATTENTION[3:], 3, 4, use_rslora=True),
    "dora": lambda path, model: write_lora(path, model, 3, ATTENTION_LINEARS, 2, 3.0, dora=True),
    "experts and router": lambda path, model: write_expert_lora(path, model, 4, 3, 5.0),
    "esft": lambda path, model: save_esft(path, model, 5, TUNED),
    "esft with shared experts": lambda path, model: save_esft(path, model, 5, TUNED, shared=(1, 2, 3)),
}
FOR_ALL = tuple(KINDS)[:-1]
MLA_RSLORA = ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
FAMILIES = {
    "llama": ("lora", "rslora", "dora"),
    "llama-tied": ("lora",),
    "phi3": ("lora",),
    "gemma2": ("lora",),
    "qwen3_moe": FOR_ALL,
    "qwen2_moe-window": ("lora", "experts and router"),
    "deepseek_v2": tuple(KINDS),
    "deepseek_v3": ("lora", "dora"),
    "glm4_moe": ("esft with shared experts",),
    "olmoe": ("lora", "dora", "experts and router", "esft"),
    "mixtral-window": ("experts and router",),
    "gpt_oss": ("lora", "experts and router"),
}
CASES = [(name, kind) for name, kinds in FAMILIES.items() for kind in kinds]


def made(root: Path, name: str, kind: str, **overrides: Any) -> Path:
    model, path = make_model(name, **overrides), root / kind.replace(" ", "-")
    if kind == "rslora" and name.startswith("deepseek"):
        return save_lora(path, model, 2, MLA_RSLORA, 3, 4, use_rslora=True)
    return KINDS[kind](path, model)


def check(engine: Engine, entry: Adapter, num_tokens: int = 21) -> AdapterChecked:
    number = engine.ask_for_check(entry.ref, num_tokens)

    def is_answered() -> bool:
        engine.step()
        return number in engine.checked

    eventually(is_answered)
    pool = engine.kv_cache.pool
    assert pool.num_free == pool.num_blocks
    return engine.checked[number]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_it_finds_no_difference_where_there_is_none(name: str, kind: str, tmp_path: Path) -> None:
    """21 tokens in blocks of 4, so that the last one is not full; more than ever run together."""
    engine = Engine(make_model(name, attention=PROBE))
    before = {key: tensor.clone() for key, tensor in engine.assembly.checker._model.state_dict().items()}
    found = check(engine, register(engine, made(tmp_path, name, kind)))
    print(f"{name}, {kind}: {found.max_difference:.1e} of {found.max_logit:.1f}")
    assert found.error is None and found.max_difference is not None and found.max_logit is not None
    assert found.max_difference < 1e-4
    assert 1.0 < found.max_logit < 100.0
    after = engine.assembly.checker._model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kind in CASES if name in ("llama", "deepseek_v2")])
def test_bfloat16_is_compared_with_float32_products(name: str, kind: str, tmp_path: Path) -> None:
    """So what is found is the rounding of serving alone."""
    engine = Engine(make_model(name, attention=PROBE).bfloat16())
    path = made(tmp_path, name, kind)
    found = check(engine, register(engine, path))
    print(f"{name}, {kind}: {found.max_difference:.1e} of {found.max_logit:.1f}")
    assert found.error is None and 0 <= (found.max_difference or 0) < 0.2 * (found.max_logit or 0)


@pytest.mark.parametrize(("name", "kind"), [("llama", "dora"), ("deepseek_v2", "dora"), ("qwen3_moe", "esft"),
                                            ("olmoe", "experts and router"), ("gpt_oss", "lora"),
                                            ("gpt_oss", "experts and router")])  # fmt: skip
def test_what_it_compares_with_is_a_merged_model(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As merged by the tests and computed by Transformers."""
    engine = Engine(make_model(name, attention=PROBE))
    entry = register(engine, made(tmp_path, name, kind))
    seen: list[Tensor] = []
    prefills = engine.assembly.checker._prefills
    plain = type(prefills).logits

    def watched(self: Any, prompt: list[int], slot: int, blocks: list[int]) -> Tensor:
        seen.append(plain(self, prompt, slot, blocks))
        asked.append(list(prompt))
        return seen[-1]

    asked: list[list[int]] = []
    monkeypatch.setattr(type(prefills), "logits", watched)
    assert check(engine, entry).error is None
    assert asked[0] == asked[1] and len(asked[0]) == 21 and 0 <= min(asked[0]) <= max(asked[0]) < VOCAB
    with torch.inference_mode():
        base = make_model(name)(torch.tensor(asked[:1])).logits[0]
        expected = merge(make_model(name), entry)(torch.tensor(asked[:1])).logits[0]
    torch.testing.assert_close(seen[1], expected, atol=1e-4, rtol=0)
    assert float((base - expected).abs().max()) > 0.1  # the adapter does something


def test_an_adapter_of_several_kinds(tmp_path: Path) -> None:
    """What replaces an expert is not acted on by LoRA for the one that it replaces."""
    engine = Engine(make_model("qwen3_moe", attention=PROBE))
    both = [register(engine, made(tmp_path, "qwen3_moe", kind)).package for kind in ("experts and router", "esft")]
    files, parts = (tuple(chain.from_iterable(getattr(it, name) for it in both)) for name in ("files", "parts"))
    entry = Adapter(AdapterRef("both", "f" * 64, "lora"), AdapterPackage("lora", "f" * 64, files, parts))
    engine.register(entry.ref, entry.package)
    assert float(check(engine, entry).max_difference or 0) < 1e-4


def installed(engine: Engine, entry: Adapter) -> int:
    slot = wait_until_resident(engine.residency, entry)
    engine.residency.release(entry.ref)
    return slot


def double_one_scale(engine: Engine, slot: int) -> None:
    """Where references read it and where kernels do."""
    site, held = next(it for it in engine.assembly.tables.lora.sites.items() if slot in it[1].by_slot)
    index, weights = next((index, it) for index, it in enumerate(held.by_slot[slot]) if it is not None)
    held.by_slot[slot][index] = weights._replace(scale=2 * weights.scale)
    if held.table is not None:
        held.table[slot] = torch.tensor(table_rows(site, held, slot))


def spoil_one_gain(engine: Engine, slot: int) -> None:
    held = engine.assembly.tables.lora._held[slot]
    gain = next(it.gain for it in held.weights if it.gain is not None)
    gain[0] *= 2


def shift_one_matrix(engine: Engine, slot: int) -> None:
    """As if it had been copied to a wrong offset."""
    held = engine.assembly.tables.lora._held[slot]
    held.weights[-1].b.copy_(held.weights[-1].b.roll(1, -2))


def swap_two_experts(engine: Engine, slot: int) -> None:
    layer = engine.assembly.tables.experts._layers[1]
    places = layer.map[slot, [0, 3]].tolist()
    layer.map[slot, [0, 3]] = torch.tensor(places[::-1], dtype=torch.int32)


def halves_of_an_expert_the_wrong_way_round(engine: Engine, slot: int) -> None:
    layer = engine.assembly.tables.experts._layers[1]
    matrix = layer.gate_up.tensor[layer.map[slot, 5]]
    matrix.copy_(torch.cat(matrix.chunk(2)[::-1]))


@pytest.mark.parametrize(("name", "kind", "spoil"), [
    ("llama", "lora", double_one_scale),
    ("llama", "dora", spoil_one_gain),
    ("deepseek_v2", "dora", spoil_one_gain),
    ("llama", "lora", shift_one_matrix),
    ("olmoe", "experts and router", shift_one_matrix),
    ("gpt_oss", "experts and router", double_one_scale),
    ("qwen3_moe", "esft", swap_two_experts),
    ("qwen3_moe", "esft", halves_of_an_expert_the_wrong_way_round),
])  # fmt: skip
def test_it_finds_what_was_done_to_an_adapter_on_the_device(
    name: str, kind: str, spoil: Callable[[Engine, int], None], tmp_path: Path
) -> None:
    engine = Engine(make_model(name, attention=PROBE))
    entry = register(engine, made(tmp_path, name, kind))
    slot = installed(engine, entry)
    assert float(check(engine, entry).max_difference or 0) < 1e-4
    with torch.inference_mode():
        spoil(engine, slot)
    assert float(check(engine, entry).max_difference or 0) > 1e-2


def test_others_are_served_the_same_meanwhile(tmp_path: Path) -> None:
    """And take prefixes from each other, none from a check."""
    name = "qwen3_moe"
    engine = Engine(make_model(name, attention=PROBE), adapter_slots=3)
    entries = [register(engine, made(tmp_path, name, kind)) for kind in FOR_ALL]
    merged = {entry.ref: merge(make_model(name), entry) for entry in entries[:2]}
    models = {None: make_model(name), **merged}
    rng = random.Random(3)
    asked: list[int] = []

    def between(step: int) -> None:
        if step < 40 and step % 3 == 0:
            engine.add(rng.choice(prompts(6)), 6, rng.choice(list(models)))
        if step < 40 and step % 4 == 0:
            asked.append(engine.ask_for_check(rng.choice(entries).ref, rng.randrange(1, 25)))

    engine.run(between)
    while len(engine.checked) < len(asked):
        engine.step()
        time.sleep(0.001)
    for answer in engine.answers.values():
        assert answer.tokens == reference(models[answer.adapter], answer.prompt, 6), answer.adapter
    assert all(it.error is None and (it.max_difference or 0) < 1e-4 for it in engine.checked.values())
    assert engine.kv_cache.pool.num_free == engine.kv_cache.pool.num_blocks
    assert all(it.pins == 0 for it in engine.residency.report())


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("name", ["llama", "deepseek_v2"])
def test_nothing_of_it_is_in_the_model_outside_of_its_pass(name: str, tmp_path: Path) -> None:
    engine = Engine(make_model(name, attention=PROBE))
    checker = engine.assembly.checker
    model: Any = checker._model
    before = hooks_of(model)

    def state() -> list[object]:
        ops = [it._ops for it in model.modules() if isinstance(it, AdaptedLinear | RoutedExperts)]
        layers = [it.cached_layer.projection for it in model.modules() if hasattr(it, "cached_layer")
                  and hasattr(it.cached_layer, "projection")]  # fmt: skip
        return [ops, layers]

    at_start = state()
    kinds = [kind for kind in FAMILIES[name] if kind != "rslora"]
    entries = [register(engine, made(tmp_path, name, kind)) for kind in kinds]
    for entry in entries:
        check(engine, entry)
        assert hooks_of(model) == before and state() == at_start
    adapter = MergedAdapter(*engine.residency.source(entries[-1].ref))
    while not adapter.is_ready():
        time.sleep(0.001)
    with pytest.raises(ZeroDivisionError), merged_into(model, checker._experts, adapter):
        assert hooks_of(model) > before
        raise ZeroDivisionError
    assert hooks_of(model) == before and state() == at_start
    adapter.close()


def test_the_reference_goes_through_nothing_that_serves_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(make_model("qwen3_moe", attention=PROBE))
    entry = register(engine, made(tmp_path, "qwen3_moe", "experts and router"))
    shapes: list[ShapeKey] = []
    plain = Model.__call__
    monkeypatch.setattr(
        Model, "__call__", lambda self, inputs: (shapes.append(inputs.rows.shape), plain(self, inputs))[1]
    )
    check(engine, entry, 8)
    assert isinstance(engine.assembly.runner.forward, HostForward)
    assert shapes == [ShapeKey(rank=3, expert_rank=3), ShapeKey()]


@pytest.mark.parametrize("pass_", ["adapter", "merged"])
def test_logits_that_are_not_finite_are_an_error(pass_: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view, magnitude, _, infinite = safetensors_file._BITS["F32"]
    monkeypatch.setitem(safetensors_file._BITS, "F32", (view, magnitude, infinite - 1, infinite))
    monkeypatch.setattr(formats, "check_outputs", lambda *_: None)
    engine = Engine(make_model("llama", attention=PROBE))
    path = made(tmp_path, "llama", "lora")
    file = path / "adapter_model.safetensors"
    save_file({key: tensor * 1e30 for key, tensor in load_file(file).items()}, file)
    entry = register(engine, path)
    if pass_ == "merged":  # the device holds something harmless, so that the adapter's own pass is over
        for weights in engine.assembly.tables.lora._held[installed(engine, entry)].weights:
            weights.b.zero_()
    found = check(engine, entry)
    assert found.error == "the model's output is not finite with this adapter" and found.max_difference is None
    answer = engine.add(prompts()[1], 8)
    engine.run()
    assert answer.tokens == reference(make_model("llama"), answer.prompt, 8)


def test_files_that_changed_or_went_since_are_an_error(tmp_path: Path) -> None:
    engine = Engine(make_model("llama", attention=PROBE))
    entry = register(engine, made(tmp_path, "llama", "lora"))
    installed(engine, entry)
    file = tmp_path / "lora" / "adapter_model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-4:] = struct.pack("<f", 3.0)
    file.write_bytes(raw)
    assert str(check(engine, entry).error).startswith(
        "its files cannot be read again: adapter_model.safetensors changed after it was registered"
    )
    file.unlink()
    assert check(engine, entry).error == "its files cannot be read again: No such file or directory"


def test_more_tokens_than_fit_in_a_step_are_refused() -> None:
    engine = Engine(make_model("llama", attention=PROBE))
    assert engine.assembly.checker.refusal(24) is None
    assert engine.assembly.checker.refusal(25) == "a check of 25 tokens; at most 24 are compared"
