"""The whole step by kernels equals the whole step by references: on a GPU, else in Triton's interpreter."""

import re
from pathlib import Path

import pytest

from kernels.adapter_rows import ShapeKey
from kernels.compiled import everywhere
from server.engine.request import Sampling
from server.model.cuda_graphs import chain, decode_shapes
from server.model.probe import PROBE
from server.model.warm_up import warm_up
from tests.support.breadth import always
from tests.support.engine_harness import GREEDY, Engine
from tests.support.stand_ins import PLACE, SMALL, StandIns, stands_in
from tests.support.tiny_adapters import register, save_esft, write_expert_lora, write_lora
from tests.support.tiny_models import make_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]


def run(engine: Engine, adapters: list[Path], sampling: Sampling) -> list[list[int]]:
    """A prompt for the base and one for each adapter, together: prefill in chunks, then decodes."""
    entries = [register(engine, path) for path in adapters]
    for length, entry in enumerate([None, *entries], start=4):
        engine.add([5 + 7 * i % 90 for i in range(length)], 2, entry.ref if entry else None, sampling)
    engine.run()
    return [request.tokens for request in engine.answers.values()]


@stands_in
@pytest.mark.thorough
@pytest.mark.parametrize("name", ["llama", "deepseek_v2"])
def test_padded_decodes_of_static_inputs(name: str, tmp_path: Path) -> None:
    """What was captured before any adapter came serves every later batch: other sizes, other adapters, other blocks;
    prompts among them, and steps that are launched before the tokens of the one before are known.

    test_told_by_kernels.py has one that always runs.
    """
    overrides = {**SMALL, "first_k_dense_replace": 1} if name.startswith("deepseek") else SMALL
    plain = make_model(name, **overrides)
    adapters = [write_lora(tmp_path / "lora", plain, 1, re.compile(r"model\.layers\.1\.self_attn\.\w+"), 3, 6.0)]
    if name == "deepseek_v2":
        adapters.append(save_esft(tmp_path / "esft", plain, 3, {1: [0, 2, 5]}))
        adapters.append(write_expert_lora(tmp_path / "experts", plain, 4, 2, 3.0))
    expected = run(Engine(make_model(name, attention=PROBE, **overrides)), adapters, GREEDY)
    with everywhere():
        engine = Engine(make_model(name, attention=PROBE, **overrides), device=PLACE, overlap="on")
        graphs = StandIns(engine, [4], decode_shapes(3, name == "deepseek_v2"), mixed=[(24, 4)])
        captured = graphs.forward.num_captured
        assert run(engine, adapters, GREEDY) == expected
    assert graphs.num_replays > 0 and graphs.forward.num_captured == captured


@stands_in
@pytest.mark.thorough
def test_a_rank_beyond_the_captured_ones_is_launched_kernel_by_kernel(tmp_path: Path) -> None:
    """In the steps that it takes part in, and only there."""
    plain = make_model("llama", **SMALL)
    adapters = [write_lora(tmp_path / "lora", plain, 1, re.compile(r"model\.layers\.1\.mlp\.\w+"), 3, 6.0)]
    expected = run(Engine(make_model("llama", attention=PROBE, **SMALL)), adapters, GREEDY)
    with everywhere():
        engine = Engine(make_model("llama", attention=PROBE, **SMALL), device=PLACE)
        graphs = StandIns(engine, [1, 2], chain([ShapeKey(rank=2)]))
        assert run(engine, adapters, GREEDY) == expected
        assert graphs.num_replays == 0
        engine.add([5, 6, 7], 2)
        engine.run()
    assert graphs.num_replays > 0


@stands_in
def test_warm_up() -> None:
    """Every path is taken, and nothing stays behind but graphs."""
    model = make_model("deepseek_v2", attention=PROBE, **SMALL, first_k_dense_replace=1)
    stages: list[tuple[str, int, int]] = []
    with everywhere():
        engine = Engine(model, tokens_per_step=8, device=PLACE)
        graphs = StandIns(engine, [2], decode_shapes(16, True), captures=False)
        warm_up(graphs.forward, 4, lambda *stage: stages.append(stage))
    assert [done for _, done, _ in stages] == list(range(1, stages[0][2] + 1))
    assert {name for name, _, _ in stages} == {"Compiling kernels", "Capturing graphs"}
    assert graphs.forward.num_captured == 4  # the base's, and three kinds of adapters


OTHERS = ("llama", "gemma2", "gpt_oss", "deepseek_v3", "qwen3_moe")  # llama's is in test_told_by_kernels.py too


@pytest.mark.parametrize("name", always(["deepseek_v2", *OTHERS], "deepseek_v2"))
def test_a_step_by_kernels(name: str, tmp_path: Path) -> None:
    overrides = {**SMALL, "first_k_dense_replace": 1} if name.startswith("deepseek") else SMALL
    plain = make_model(name, **overrides)
    linears = re.compile(r"model\.layers\.\d+\.(self_attn|mlp|mlp\.shared_experts)\.\w+")
    adapters = [
        write_lora(tmp_path / "lora-1", plain, 1, linears, 4, 8.0),
        write_lora(
            tmp_path / "lora-2", plain, 2, re.compile(r"model\.layers\.1\.self_attn\.(q|kv_b|v)_proj|lm_head"), 9, 9.0
        ),
    ]  # fmt: skip
    dora = re.compile(r"model\.layers\.\d+\.self_attn\.\w+")
    adapters.append(write_lora(tmp_path / "dora", plain, 5, dora, 3, 5.0, dora=True))
    if name not in ("llama", "gemma2"):
        adapters.append(write_expert_lora(tmp_path / "experts", plain, 4, 2, 3.0))
    if name in ("deepseek_v2", "qwen3_moe"):
        shared = [1] if name == "deepseek_v2" else []
        adapters.append(save_esft(tmp_path / "esft", plain, 3, {1: [0, 2, 5]}, shared=shared))
    expected = run(Engine(make_model(name, attention=PROBE, **overrides)), adapters, GREEDY)
    with everywhere():
        engine = Engine(make_model(name, attention=PROBE, **overrides), device=PLACE)
        assert run(engine, adapters, GREEDY) == expected
    assert len({tuple(tokens) for tokens in expected}) > 1, "the adapters make no difference"


def test_shared_experts_of_an_adapter_are_places_like_the_base_s(tmp_path: Path) -> None:
    """In steps without LoRA: none of them asks the layer that they are in Transformers."""
    changes = {**SMALL, "first_k_dense_replace": 1}
    adapters = [save_esft(tmp_path / "it", make_model("deepseek_v2", **changes), 3, {1: [0]}, shared=[1])]
    expected = run(Engine(make_model("deepseek_v2", attention=PROBE, **changes)), adapters, GREEDY)
    with everywhere():
        engine = Engine(make_model("deepseek_v2", attention=PROBE, **changes), device=PLACE)
        shared = engine.assembly.checker._experts[0].shared
        assert shared is not None and shared.are_in_stack
        asked: list[object] = []
        shared.layer.down_proj.register_forward_pre_hook(lambda *it: asked.append(it))  # type: ignore[attr-defined]
        assert run(engine, adapters, GREEDY) == expected
    assert expected[0] != expected[1] and not asked


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["gemma4_text-moe", "mimo_v2_flash", "cohere2", "phimoe", "glm4_moe"])
def test_a_base_of_its_own_shape_by_kernels(name: str) -> None:
    """Heads of several sizes, values narrower than keys, ropes and routers that stay Transformers'."""
    expected = run(Engine(make_model(name, attention=PROBE)), [], GREEDY)
    with everywhere():
        assert run(Engine(make_model(name, attention=PROBE), device=PLACE), [], GREEDY) == expected
