"""One kernel at one shape: what it should give, and the least that anyone must move to get it."""

from collections.abc import Iterator
from importlib import import_module

from benchmarks.gpu.cases.case import Case, Draw, errors_of

__all__ = ["Case", "Draw", "cases_of", "errors_of"]

_MODULES = {"expert_route": "experts", "expert_tiles": "experts", "grouped_gemm": "experts", "lora": "lora",
            "gated": "layer", "paged_attention": "attention", "store_kv": "attention", "latent_prep": "layer",
            "rope_store": "layer", "rms_norm": "rows", "rope": "rows", "sampling": "rows", "logprobs": "rows",
            "step_rows": "steps"}  # fmt: skip


def cases_of(op: str, draw: Draw) -> Iterator[Case]:
    """All of an op. Inputs are drawn anew."""
    module = import_module(f"benchmarks.gpu.cases.{_MODULES[op]}")
    yield from getattr(module, op)(draw)
