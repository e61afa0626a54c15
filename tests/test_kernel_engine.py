"""The whole step by kernels equals the whole step by references: on a GPU, else in Triton's interpreter."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.compiled import everywhere
from server.engine.request import Sampling
from server.model.cuda_graphs import GraphedForward
from server.model.forward import KernelForward
from server.model.probe import PROBE
from server.model.warm_up import warm_up
from tests.engine_harness import GREEDY, Engine, generated
from tests.kernel_device import DEVICE
from tests.tiny_adapters import register, save_esft, write_lora
from tests.tiny_models import make_model

SMALL = dict(num_hidden_layers=2, hidden_size=32, intermediate_size=40, vocab_size=97)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]


PLACE = torch.device(DEVICE)


def run(engine: Engine, adapters: list[Path], sampling: Sampling) -> list[list[int]]:
    """A prompt for the base and one for each adapter, together: prefill in chunks, then decodes."""
    entries = [register(engine, path) for path in adapters]
    for length, entry in enumerate([None, *entries], start=4):
        engine.add([5 + 7 * i % 90 for i in range(length)], 2, entry.ref if entry else None, sampling)
    engine.run()
    return [generated(request) for request in engine.requests]


class Rerun:
    """Stands for a captured graph where there is none: the same computation on the same memory."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self._compute = compute
        self.output = compute()

    def replay(self) -> None:
        self.output.copy_(self._compute())


stands_in = pytest.mark.skipif(DEVICE == "cuda", reason="stands in for graphs, which test_a_step_by_kernels has here")


@stands_in
@pytest.mark.parametrize("name", ["llama", "deepseek_v2"])
def test_padded_decodes_of_static_inputs(name: str, tmp_path: Path) -> None:
    """What graphs are captured with serves every later batch: other sizes, other adapters, other blocks."""
    overrides = {**SMALL, "first_k_dense_replace": 1} if name.startswith("deepseek") else SMALL
    plain = make_model(name, **overrides)
    adapters = [write_lora(tmp_path / "lora", plain, 1, re.compile(r"model\.layers\.1\.self_attn\.\w+"), 3, 6.0)]
    if name == "deepseek_v2":
        adapters.append(save_esft(tmp_path / "esft", plain, 3, {1: [0, 2, 5]}))
    expected = run(Engine(make_model(name, attention=PROBE, **overrides)), adapters, GREEDY)
    with everywhere():
        engine = Engine(make_model(name, attention=PROBE, **overrides), device=PLACE)
        runner = engine.assembly.runner
        eager = runner.forward
        assert isinstance(eager, KernelForward)
        graphed = GraphedForward(eager.model, eager.inputs, engine.residency, 8, Rerun)
        runner.forward = graphed
        assert run(engine, adapters, GREEDY) == expected
    assert graphed.num_captured > 0


@stands_in
def test_warm_up() -> None:
    """Every path is taken, and nothing stays behind: neither a use of a site nor a counter."""
    model = make_model("deepseek_v2", attention=PROBE, **SMALL, first_k_dense_replace=1)
    stages: list[tuple[str, int, int]] = []
    with everywhere():
        engine = Engine(model, tokens_per_step=8, device=PLACE)
        eager = engine.assembly.runner.forward
        assert isinstance(eager, KernelForward)
        graphed = GraphedForward(eager.model, eager.inputs, engine.residency, 2, Rerun)
        warm_up(graphed, engine.residency.sites, True, 4, lambda *stage: stages.append(stage))
    assert [done for _, done, _ in stages] == list(range(1, stages[0][2] + 1))
    assert {name for name, _, _ in stages} == {"Compiling kernels", "Capturing graphs"}
    assert graphed.num_captured == 4  # one and two rows, with and without expert adapters
    assert engine.residency.num_sites_used == 0


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "deepseek_v2", "deepseek_v3", "qwen3_moe"])
def test_a_step_by_kernels(name: str, tmp_path: Path) -> None:
    overrides = {**SMALL, "first_k_dense_replace": 1} if name.startswith("deepseek") else SMALL
    plain = make_model(name, **overrides)
    adapters = [
        write_lora(tmp_path / "lora-1", plain, 1, re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+"), 4, 8.0),
        write_lora(
            tmp_path / "lora-2", plain, 2, re.compile(r"model\.layers\.1\.self_attn\.(q|kv_b|v)_proj|lm_head"), 9, 9.0
        ),
    ]  # fmt: skip
    if name in ("deepseek_v2", "qwen3_moe"):
        adapters.append(save_esft(tmp_path / "esft", plain, 3, {1: [0, 2, 5]}))
    expected = run(Engine(make_model(name, attention=PROBE, **overrides)), adapters, GREEDY)
    with everywhere():
        engine = Engine(make_model(name, attention=PROBE, **overrides), device=PLACE)
        assert run(engine, adapters, GREEDY) == expected
    assert len({tuple(tokens) for tokens in expected}) > 1, "the adapters make no difference"
