"""Weights that pass one by one, and whose products do not fit into float16."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapters_store.base_spec import BaseSpec, ExpertStack
from adapters_store.errors import InvalidAdapter
from adapters_store.files import Folder
from adapters_store.overflow import MAX_OUTPUT, largest_output
from adapters_store.parts import ExpertReplacement, LowRank
from adapters_store.verifier import Verifier
from adapters_store.verify import Job
from tests.support.adapter_files import BASE, delta, edit_weights, esft, lora, operand, read_adapter, save_peft

DEMO = Path(__file__).resolve().parents[2] / "demo"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _the_same_weights() -> None:
    """Few numbers of random signs may cancel: with these they do not."""
    torch.manual_seed(1)


def all_times(factor: float, of: str = "") -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for key in tensors:
            if of in key:
                tensors[key] *= factor

    return change


def all_of(value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for tensor in tensors.values():
            tensor[:] = value * torch.randn_like(tensor).sign()

    return change


@pytest.mark.parametrize("write", [lora, lambda path: esft(path, {1: [0, 3]})], ids=["LoRA", "ESFT"])
def test_weights_of_60_000_are_refused_by_the_module(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    directory = edit_weights(write(tmp_path / "a"), all_of(6e4))
    with pytest.raises(InvalidAdapter, match=r"(layers\.|expert \d of layer 1: ).*reaches [1-9][0-9,]+, and 65,504 is"):
        read_adapter(directory, BASE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_bound_is_on_the_output(tmp_path: Path, dtype: torch.dtype) -> None:
    """One number in each of A and B, so that y is their product, but for its sign."""
    module = "model.layers.0.self_attn.q_proj"

    def saved(name: str, weight: float, scale: float) -> Path:
        a, b = torch.zeros(1, 8, dtype=dtype), torch.zeros(8, 1, dtype=dtype)
        a[0, 3], b[5, 0] = 1, weight
        tensors = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        return save_peft(tmp_path / name, tensors, rank=1, lora_alpha=scale)

    assert read_adapter(saved("a", 65_280, 1.0), BASE)
    assert read_adapter(saved("b", 32_640, 2.0), BASE)
    with pytest.raises(InvalidAdapter, match=f"{module}: .* reaches 66,560, and 65,504"):
        read_adapter(saved("c", 33_280, 2.0), BASE)


def test_what_is_not_finite_is_refused(tmp_path: Path) -> None:
    directory = edit_weights(esft(tmp_path / "a", {1: [0]}), all_of(6e4))
    edit_weights(directory, all_times(0.0, of="down"))
    assert read_adapter(directory, BASE)  # nothing comes of it
    directory = edit_weights(lora(tmp_path / "b", lora_alpha=1e9), all_of(6e4))
    with pytest.raises(InvalidAdapter, match="reaches"):
        read_adapter(directory, BASE)


def test_experts_of_target_parameters_are_tried_one_by_one(tmp_path: Path) -> None:
    name, count, inner = "model.layers.1.mlp.experts", 4, 6
    base = BaseSpec("qwen3_moe", {}, {1: ExpertStack(count, 8, inner, name)})
    tensors = {
        f"{name}.lora_A.weight": torch.randn(count * 2, inner),
        f"{name}.lora_B.weight": torch.randn(8, 2 * count),
    }
    config: dict[str, Any] = dict(target_modules=[], target_parameters=["mlp.experts.down_proj"], peft_version="0.21.2")
    assert read_adapter(save_peft(tmp_path / "a", tensors, **config), base)
    tensors[f"{name}.lora_B.weight"][:, 2::count] = 6e4  # one expert's
    with pytest.raises(InvalidAdapter, match=f"{name}.down_proj: "):
        read_adapter(save_peft(tmp_path / "b", tensors, **config), base)


def test_the_figure_is_that_of_the_dense_weights(tmp_path: Path) -> None:
    with Folder(str(lora(tmp_path / "a")), (os.path.realpath(tmp_path),)) as folder:
        package = read_adapter(tmp_path / "a", BASE)
        file = folder.open("adapter_model.safetensors")
        for part in package.parts:
            assert isinstance(part, LowRank)
            outputs = [abs(delta(package, part.module) @ signs(part.a.shape[-1])).max().item()]
            assert largest_output(part, {file.name: file}) == pytest.approx(outputs[0], rel=1e-4)
    directory = esft(tmp_path / "b", {1: [2]})
    with Folder(str(directory), (os.path.realpath(tmp_path),)) as folder:
        package = read_adapter(directory, BASE)
        file = folder.open("model-00001-of-000001.safetensors")
        [part] = package.parts
        assert isinstance(part, ExpertReplacement)
        gate, up = (operand(package, it) @ signs(8) for it in part.gate_up)
        y = operand(package, part.down) @ (torch.nn.functional.silu(gate) * up)
        assert largest_output(part, {file.name: file}) == pytest.approx(y.abs().max().item(), rel=1e-4)


def signs(width: int) -> torch.Tensor:
    from adapters_store.overflow import _input

    x = torch.from_numpy(_input(width)).double()
    assert x.shape == (width,) and set(x.tolist()) <= {1.0, -1.0}
    return x


def test_the_input_has_no_pattern() -> None:
    x = signs(4096)
    assert abs(x.mean()) < 0.05 and abs((x[1:] * x[:-1]).mean()) < 0.05


def test_a_matrix_larger_than_the_processs_memory_is_tried(tmp_path: Path) -> None:
    """In the process that verifies, which has 512 MiB of addresses."""
    hidden, rank = 80_000, 1000
    base = BaseSpec("llama", {"lm": (hidden, hidden)}, {})
    ones = {"lm.lora_A.weight": torch.zeros(rank, hidden, dtype=torch.float16),
            "lm.lora_B.weight": torch.zeros(hidden, rank, dtype=torch.float16)}  # fmt: skip
    directory = save_peft(tmp_path / "a", ones, rank=rank)

    async def verify() -> None:
        verifier = Verifier(timeout_s=60, num_workers=1)
        try:
            job = Job(str(directory), (os.path.realpath(tmp_path),), base)
            assert (await verifier.verify(job)).weights.kind == "lora"
        finally:
            await verifier.close()

    asyncio.run(verify())


@pytest.mark.parametrize("name", sorted(it.name for it in (DEMO / "adapters").iterdir()))
def test_what_was_trained_is_far_below(name: str) -> None:
    directory = DEMO / "adapters" / name
    file = next(directory.glob("*.safetensors"))
    base = demo_base(load_file(DEMO / "base" / "model.safetensors"))
    package = read_adapter(directory, base)
    with Folder(str(directory), (os.path.realpath(directory.parent),)) as folder:
        files = {file.name: folder.open(file.name)}
        largest = max(largest_output(part, files) for part in package.parts)
    assert 0 < largest < MAX_OUTPUT / 100


def demo_base(weights: Tensors) -> BaseSpec:
    shapes = {key.removesuffix(".weight"): tuple(it.shape) for key, it in weights.items() if it.dim() == 2}
    linears = {name: shape for name, shape in shapes.items() if ".experts." not in name}
    stacks = {}
    for layer in range(64):
        name = f"model.layers.{layer}.mlp.experts"
        experts = [it for it in shapes if it.startswith(f"{name}.") and it.endswith(".gate_proj")]
        if experts:
            inner, hidden = shapes[experts[0]]
            stacks[layer] = ExpertStack(len(experts), hidden, inner, name)
    return BaseSpec("demo", linears, stacks)  # type: ignore[arg-type]
