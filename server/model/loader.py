"""Load a base model as Transformers defines it. What is ours is put in afterwards (injections)."""

from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig
from transformers.utils import logging as transformers_logging

from server.model.checkpoint import read_config, weight_files
from server.model.families import Foreign, UnsupportedModelError, check_family, settle
from server.model.probe import PROBE
from server.model.text_half import TextHalf, text_half
from server.model.unlisted import list_unlisted

OnProgress = Callable[[str, int, int], None]  # stage, done, total


def load_model(
    model_dir: Path, dtype: torch.dtype, on_progress: OnProgress
) -> tuple[nn.Module, GenerationConfig | None]:
    """A Transformers causal LM in eval mode. Raises UnsupportedModelError before reading any weight."""
    list_unlisted()
    config = read_config(model_dir)
    half = text_half(config)
    check_family(config if half is None else half.config)
    settle(config if half is None else half.config)
    weight_files(model_dir)
    model = load_weights(model_dir, config if half is None else half, dtype, on_progress)
    has_generation = (model_dir / "generation_config.json").is_file()
    generation = GenerationConfig.from_pretrained(model_dir, local_files_only=True) if has_generation else None
    return model, generation


def load_weights(model_dir: Path, of: Foreign | TextHalf, dtype: torch.dtype, on_progress: OnProgress) -> nn.Module:
    """`of`: the configuration, or the text half. Raises UnsupportedModelError where the tensors are not the model's."""
    half = of if isinstance(of, TextHalf) else None
    config = of if half is None else half.config
    previous = transformers_logging.set_tqdm_hook(_report_bars(on_progress))
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it tells of what is missing as if it could be gone on with
    try:
        with half.opened(model_dir) if half is not None else nullcontext() as tensors:
            model, report = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
                model_dir if half is None else None,  # it takes either this or tensors
                config=config,
                state_dict=tensors,
                dtype=dtype,
                attn_implementation=PROBE,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are in the report, by name
                output_loading_info=True,
            )
    finally:
        transformers_logging.set_tqdm_hook(previous)
        transformers_logging.set_verbosity(verbosity)
    _check_coverage(report)
    evaluated: nn.Module = model.eval()
    return evaluated


def _check_coverage(report: dict[str, Any]) -> None:
    """Every parameter comes from the checkpoint: Transformers fills the rest with random numbers and goes on."""
    stray = [key for key in report["unexpected_keys"] if not key.endswith("rotary_emb.inv_freq")]  # old checkpoints
    others = [f"{key} {list(has)} instead of {list(wanted)}" for key, has, wanted in report["mismatched_keys"]]
    for what, keys in (("lacks", report["missing_keys"]), ("has in another shape", others),
                       ("has beyond what the model takes", stray)):  # fmt: skip
        if keys:
            count = f"{len(keys)} tensor{'s' * (len(keys) > 1)}"
            shown = ", ".join(sorted(keys)[:3]) + ", …" * (len(keys) > 3)
            raise UnsupportedModelError(
                f"the checkpoint {what} {count}: {shown}. Is config.json another model's, or a file missing?"
            )


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
