"""A Triton driver that compiles what is launched, for a chip that is not there, and launches nothing.

    python -m tests.support.compile_only MODEL_TYPE...

Runs the engine's warm-up at real widths in bfloat16 (two layers, few experts): every kernel is compiled as its own
launch function asks for it, with the types, alignments and constants that it passes. That is what the interpreter
cannot show, and what the list of configurations only repeats. Outputs are whatever the memory held.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # the decorator decides at import
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from kernels.compiled import everywhere
from server.assembly import assemble
from server.config import EngineConfig
from server.engine.fake_masks import FakeMasks
from server.model.cuda_graphs import GraphedForward, decode_shapes
from server.model.forward import KernelForward
from server.model.probe import PROBE
from server.model.warm_up import warm_up

LAUNCHED: Counter[str] = Counter()


class _Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self._name = source.name

    def __call__(self, *_: object, **__: object) -> None:
        LAUNCHED[self._name] += 1


class _Utils:
    """What Triton asks of a device when it loads a kernel."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads

    def unload_module(self, module: int) -> None: ...


class CompileOnly(DriverBase):
    """An H100 or H200 as far as compilation goes."""

    def __init__(self) -> None:
        self.utils = _Utils()
        self.launcher_cls = _Launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


_SMALL = dict(num_hidden_layers=2, vocab_size=2000, max_position_embeddings=8192, tie_word_embeddings=False)
MODELS: dict[str, dict[str, Any]] = {
    "llama": dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8),
    "gemma2": dict(hidden_size=3584, intermediate_size=14336, num_attention_heads=16, num_key_value_heads=8,
                   head_dim=256),
    "gpt_oss": dict(hidden_size=2880, intermediate_size=2880, num_attention_heads=64, num_key_value_heads=8,
                    head_dim=64, num_local_experts=4, num_experts_per_tok=4),
    "qwen3_moe": dict(hidden_size=2048, moe_intermediate_size=768, num_attention_heads=32, num_key_value_heads=4,
                      head_dim=128, num_experts=8, num_experts_per_tok=8),
    "deepseek_v2": dict(hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, num_attention_heads=16,
                        num_key_value_heads=16, n_shared_experts=2, n_routed_experts=8, num_experts_per_tok=6,
                        kv_lora_rank=512, q_lora_rank=None, qk_rope_head_dim=64, v_head_dim=128, qk_nope_head_dim=128,
                        topk_method="greedy", first_k_dense_replace=1),
    "deepseek_v3": dict(hidden_size=2048, intermediate_size=4096, moe_intermediate_size=1408, num_attention_heads=16,
                        num_key_value_heads=16, n_shared_experts=1, n_routed_experts=16, num_experts_per_tok=8,
                        n_group=4, topk_group=2, kv_lora_rank=512, q_lora_rank=1536, qk_rope_head_dim=64,
                        v_head_dim=128, qk_nope_head_dim=128, first_k_dense_replace=1),
}  # fmt: skip


def _once(compute: Callable[[], object]) -> Callable[[], object]:
    """In the place of a capture: compiling is all that is wanted."""
    compute()
    return compute


def compile_engine(model_type: str, **sizes: Any) -> Counter[str]:
    """Warm an engine up, with `sizes` for the model's own; returns how often each kernel would have been launched."""
    LAUNCHED.clear()
    config = CONFIG_MAPPING[model_type](**{**_SMALL, **MODELS[model_type], **sizes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=PROBE).eval()
    settings = EngineConfig(".", kv_cache_bytes=1 << 28, adapter_bytes=1 << 28, adapter_slots=2, max_running=16,
                            tokens_per_step=1024, max_model_len=4096, self_check=False)  # fmt: skip
    assembly = assemble(model, settings, frozenset(), FakeMasks())
    eager = assembly.runner.forward
    assert isinstance(eager, KernelForward)
    shapes = decode_shapes(64, "experts" in str(config))
    forward = GraphedForward(eager, torch.empty(16, config.vocab_size, dtype=torch.bfloat16), shapes, _once)
    warm_up(forward, settings.block_size, lambda *_: None)
    return Counter(LAUNCHED)


def main() -> int:
    triton.runtime.driver.set_active(CompileOnly())
    with everywhere():
        for model_type in sys.argv[1:] or MODELS:
            print(model_type, dict(compile_engine(model_type)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
