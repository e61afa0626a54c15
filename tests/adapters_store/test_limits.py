"""How much is read of an adapter: as ever for a small base, and for a large mixture what its adapters need."""

import json
import time
from pathlib import Path

import msgspec

from adapters_store.base_spec import BaseSpec, ExpertStack
from adapters_store.limits import MAX_HEADER_BYTES, MAX_TENSORS, Limits, limits_of
from adapters_store.parts import AdapterPackage
from adapters_store.verify import Job, Verified, answer
from adapters_store.worker_process import MAX_ANSWER_BYTES
from tests.support.adapter_files import BASE, DENSE

LAYERS, EXPERTS, HIDDEN, INNER = 48, 128, 4, 2


def mixture(layers: int = LAYERS, experts: int = EXPERTS) -> BaseSpec:
    linears = {
        f"model.layers.{layer}.self_attn.{name}_proj": (HIDDEN, HIDDEN) for layer in range(layers) for name in "qkvo"
    }
    names = {layer: f"model.layers.{layer}.mlp.experts" for layer in range(layers)}
    stacks = {layer: ExpertStack(experts, HIDDEN, INNER, name) for layer, name in names.items()}
    return BaseSpec("qwen3_moe", linears, stacks)


def every_expert(directory: Path) -> Path:
    """An adapter with tensors for every matrix of every expert, under the names of Transformers 4."""
    directory.mkdir()
    header, end = {}, 0
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            for name, (rows, columns) in {
                "gate": (INNER, HIDDEN),
                "up": (INNER, HIDDEN),
                "down": (HIDDEN, INNER),
            }.items():
                for side, shape in (("A", (1, columns)), ("B", (rows, 1))):
                    key = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}_proj.lora_{side}.weight"
                    begin, end = end, end + 2 * shape[0] * shape[1]
                    header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    (directory / "adapter_model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + b"\0" * end)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["gate_proj", "up_proj", "down_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def test_a_small_base_is_held_to_what_it_was() -> None:
    assert limits_of(BASE) == limits_of(DENSE) == Limits() == Limits(1 << 20, 20_000)


def test_limits_grow_with_the_base_and_end_somewhere() -> None:
    large = limits_of(mixture())
    assert large.tensors >= LAYERS * EXPERTS * 6 + LAYERS * 4 * 2 and 5 << 20 < large.header_bytes < 8 << 20
    assert limits_of(mixture(100, 1000)) == Limits(MAX_HEADER_BYTES, MAX_TENSORS) == Limits(16 << 20, 120_000)


def test_an_adapter_of_every_expert_of_a_large_mixture_is_verified(tmp_path: Path) -> None:
    directory = every_expert(tmp_path / "a")
    begin = time.process_time()
    found = answer(Job(str(directory), (str(tmp_path.resolve()),), mixture()))
    assert time.process_time() - begin < 30
    assert isinstance(found, Verified), found
    package = msgspec.msgpack.decode(found.content.package, type=AdapterPackage)
    assert len(package.parts) == LAYERS * 3 and package.num_elements == LAYERS * EXPERTS * 3 * (HIDDEN + INNER)
    assert len(msgspec.msgpack.encode(found)) < MAX_ANSWER_BYTES / 4
    small = answer(Job(str(directory), (str(tmp_path.resolve()),), BASE))
    assert not isinstance(small, Verified) and "at most 1,048,576 are read for this base" in small.message
