"""A mixed batch on this device equals each request alone on merged weights, computed by Transformers."""

import re
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.measure import Scale
from server.model.probe import PROBE
from tests.engine_harness import Engine, generated, prompts
from tests.test_families import reference
from tests.tiny_adapters import merge, register, save_esft, write_lora
from tests.tiny_models import make_model

LINEARS = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+")


def check(scale: Scale) -> list[dict[str, Any]]:
    """float32, greedy: the same tokens, family by family."""
    rows = []
    for name in ("llama", "gemma2", "gpt_oss", "qwen3_moe", "deepseek_v2", "deepseek_v3")[
        : 1 if scale.is_toy else None
    ]:
        plain = make_model(name)
        with tempfile.TemporaryDirectory() as folder:
            paths = [
                write_lora(Path(folder) / f"lora-{rank}", plain, rank, LINEARS, rank, 2.0 * rank) for rank in (4, 9)
            ]
            if "moe" in name or name == "deepseek_v2":
                paths.append(save_esft(Path(folder) / "esft", plain, 3, {1: [0, 2, 5], 3: [1]}))
            engine = Engine(make_model(name, attention=PROBE), device=scale.device)
            entries = [register(engine, path) for path in paths]
            expected = {None: plain} | {entry.ref: merge(make_model(name), entry) for entry in entries}
            refs = list(expected)
            count, new_tokens = scale.size(10, 2), scale.size(12, 2)
            for index, prompt in enumerate(prompts(count)):
                engine.add(prompt[: scale.size(99, 6)], new_tokens, refs[index % len(refs)])
            engine.run()
            right = sum(
                generated(request)
                == reference(expected[request.adapter], request.tokens[: request.prompt_len], new_tokens)
                for request in engine.requests
            )
        rows.append({"family": name, "requests": count, "equal": right, "ok": right == count})
    torch.cuda.empty_cache()
    return rows
