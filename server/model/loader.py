"""Load a base model as Transformers defines it. What is ours is put in afterwards (injections)."""

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging as transformers_logging

from server.model.families import UnsupportedModelError, check_family
from server.model.probe import PROBE

OnProgress = Callable[[str, int, int], None]  # stage, done, total


def load_model(
    model_dir: Path, dtype: torch.dtype, on_progress: OnProgress
) -> tuple[nn.Module, GenerationConfig | None]:
    """A Transformers causal LM in eval mode. Raises UnsupportedModelError before reading any weight."""
    if not (model_dir / "config.json").is_file():
        raise UnsupportedModelError(f"{model_dir.name!r} holds no config.json, so it is not a Transformers model")
    config = AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    check_family(config)
    previous = transformers_logging.set_tqdm_hook(_report_bars(on_progress))
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            model_dir,
            config=config,
            dtype=dtype,
            attn_implementation=PROBE,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    finally:
        transformers_logging.set_tqdm_hook(previous)
    _check_coverage(report)
    has_generation = (model_dir / "generation_config.json").is_file()
    generation = GenerationConfig.from_pretrained(model_dir, local_files_only=True) if has_generation else None
    return model.eval(), generation


def _check_coverage(report: dict[str, Any]) -> None:
    """Every parameter comes from the checkpoint: Transformers fills the rest with random numbers and goes on."""
    stray = [key for key in report["unexpected_keys"] if not key.endswith("rotary_emb.inv_freq")]  # old checkpoints
    for what, keys in (("lacks", report["missing_keys"]), ("has in another shape", report["mismatched_keys"]),
                       ("has beyond what the model takes", stray)):  # fmt: skip
        if keys:
            shown = ", ".join(str(key) for key in sorted(keys)[:3])
            raise UnsupportedModelError(f"the checkpoint {what} {len(keys)} tensors: {shown}{', …' * (len(keys) > 3)}")


def _report_bars(on_progress: OnProgress) -> Callable[..., Any]:
    """Turn the progress bar over the weights into messages; any other bar stays silent."""

    def hook(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args:
            return factory(**{**kwargs, "disable": True})
        return _reported(args[0], str(kwargs.get("desc", "Loading")), on_progress)

    return hook


def _reported(items: Collection[Any], stage: str, on_progress: OnProgress) -> Iterator[Any]:
    for done, item in enumerate(items, start=1):
        yield item
        on_progress(stage, done, len(items))
