"""A decode step can be captured in a CUDA graph: traced on a device without memory, it neither reads back nor waits.

Tensors of torch's meta device have shapes and no contents, so whatever depends on contents (a read-back, a shape)
raises. They stand for the GPU's: a tensor that is made anywhere else would be a copy between host and device.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from kernels.adapter_rows import ShapeKey
from kernels.compiled import everywhere
from kernels.lora import TABLE_FIELDS, LoraSite, SiteAdapters, Split
from server.model.build import Build
from server.model.device_inputs import Capacity, DeviceInputs, Sizes
from server.model.experts import Stacks
from server.model.families import pin_rope
from server.model.forward import Model
from server.model.injections import inject
from server.model.inputs import CurrentStep
from server.model.lora_op import LoraOps
from server.model.probe import PROBE, probe
from server.model.product import product_of
from server.model.unlisted import list_unlisted
from server.weights.kv_memory import WholeKVMemory
from tests.support.thirds import a_third
from tests.support.tiny_models import MODELS, make_config

META = torch.device("meta")
ROWS, SEQUENCES, BLOCKS, SLOTS = 8, 8, 16, 4


class Watch(TorchDispatchMode):
    """Notes every op, and every tensor that is made elsewhere than on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []
        self.elsewhere: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.ops.append(str(function))
        for tensor in out if isinstance(out, list | tuple) else (out,):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta" and tensor.dim() > 0:
                self.elsewhere.append(f"{function} made {tuple(tensor.shape)} on {tensor.device}")
        return out


def fake_stacks(layer: int, gate_up: Tensor, down: Tensor) -> Stacks:
    room = len(gate_up) + SLOTS * 8
    expert_map = torch.empty(SLOTS + 1, len(gate_up), dtype=torch.int32, device=META)
    return Stacks(*(it.new_empty(room, *it.shape[1:], device=META) for it in (gate_up, down)), expert_map)


class FakeSites:
    """A table of low-rank parts, none of which is there."""

    def open(self, site: LoraSite) -> SiteAdapters:
        table = torch.empty(SLOTS + 1, len(site.widths), TABLE_FIELDS, dtype=torch.int64, device=META)
        return SiteAdapters({}, table, torch.empty(len(site.widths) + 1, dtype=torch.int32, device=META))

    def bind(
        self,
        module: str,
        sites: Sequence[tuple[LoraSite, Split]],
        dtype: torch.dtype,
        rows: Callable[[], Tensor] | None = None,
    ) -> None: ...


@pytest.mark.parametrize("with_adapters", [False, True], ids=["base only", "adapters"])
@pytest.mark.parametrize("name", a_third(MODELS, always_too=("llama", "deepseek_v2", "gpt_oss")))
def test_a_decode_step_can_be_captured(name: str, with_adapters: bool) -> None:
    list_unlisted()
    config = make_config(name)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=PROBE, dtype=torch.bfloat16).eval()
    pin_rope(model, config, config.max_position_embeddings)
    step = CurrentStep()
    probed = probe(model, config.max_position_embeddings)
    memory = WholeKVMemory(32, 16, torch.bfloat16, META)
    with torch.inference_mode():  # what it finds by trying needs numbers
        injected = inject(Build(model, probed, step, [LoraOps(FakeSites(), step)], fake_stacks, product_of))
    model.to(META)
    with everywhere(), torch.inference_mode(), META:
        for layer in injected.layers:
            layer.allocate(memory.tensor)
        inputs = DeviceInputs(Capacity(ROWS, SEQUENCES, BLOCKS, slices=8), META)
        shape = ShapeKey(64, 1, 64) if with_adapters else ShapeKey()
        views = inputs.views(Sizes(ROWS, ROWS, ROWS, max_query_len=1), shape, at_all_sites=True)
        with Watch() as watch:
            logits = Model(model, step)(views)
    assert logits.shape == (ROWS, config.vocab_size) and logits.device == META
    assert not watch.elsewhere
    assert any("heddle.paged_attention" in op for op in watch.ops)
    assert any("heddle.lora" in op for op in watch.ops) == with_adapters
    assert any("heddle.expert_route" in op for op in watch.ops) == bool(injected.experts)
    assert any("heddle.expert_lora" in op for op in watch.ops) == (with_adapters and bool(injected.experts))
