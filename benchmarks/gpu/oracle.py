"""A mixed batch on this device equals each request alone on merged weights, computed by Transformers."""

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.measure import Bench
from benchmarks.gpu.report import Row
from server.model.probe import PROBE
from tests.support.engine_harness import Engine, prompts
from tests.support.tiny_adapters import merge, register, save_esft, write_expert_lora, write_lora
from tests.support.tiny_models import make_model, reference

LINEARS = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+")


def families(bench: Bench) -> Iterator[Row]:
    """float32, greedy: the same tokens, family by family."""
    for name in bench.parts[: 1 if bench.scale.is_toy else None]:
        with tempfile.TemporaryDirectory() as folder:
            yield _compared(bench, name, Path(folder))


def _compared(bench: Bench, name: str, folder: Path) -> Row:
    size = bench.scale.size
    plain = make_model(name)
    paths = [write_lora(folder / f"lora-{rank}", plain, rank, LINEARS, rank, 2.0 * rank) for rank in (4, 9)]
    paths.append(write_lora(folder / "dora", plain, 5, LINEARS, 3, 5.0, dora=True))
    if hasattr(plain.config, "num_experts_per_tok"):
        paths.append(write_expert_lora(folder / "experts", plain, 4, 2, 3.0))
    if "moe" in name or name == "deepseek_v2":
        paths.append(save_esft(folder / "esft", plain, 3, {1: [0, 2, 5], 3: [1]}))
    engine = Engine(make_model(name, attention=PROBE), device=bench.scale.device)
    entries = [register(engine, path) for path in paths]
    expected = {None: plain} | {entry.ref: merge(make_model(name), entry) for entry in entries}
    refs, count, new_tokens = list(expected), size(10, 2), size(12, 2)
    for index, prompt in enumerate(prompts(count)):
        engine.add(prompt[: size(99, 6)], new_tokens, refs[index % len(refs)])
    engine.run()
    right = sum(it.tokens == reference(expected[it.adapter], it.prompt, new_tokens) for it in engine.answers.values())
    return {"family": name, "requests": count, "equal": right, "ok": right == count}
