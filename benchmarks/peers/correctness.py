"""Are a system's answers those of Transformers, in float32, with the adapter's weights merged into the base?

A reference reads each answer as it is and says at every position which token it would have chosen. That a token is not
the most likely one is forgiven where the two are as good as equal, a near-tie; a system that leaves an adapter out, or
computes in bfloat16, is not.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.peers.load import Answer, Check, Load
from benchmarks.workload import Job

TIE = 1e-3  # of the largest logit
SAMPLE = 6  # requests of a mode
_MOST_MODELS = 4  # merged ones, kept


class Judge:
    """References of one model directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._merged: dict[str | None, nn.Module] = {}

    def check(self, system: str, mode: str, load: Load, answers: Sequence[Answer]) -> Check:
        """All answers must be as long as asked; SAMPLE of them, spread over the adapters, are read."""
        short = sum(len(it.tokens) != load.new_tokens for it in answers)
        if len(answers) != len(load.jobs) or short:
            return Check(
                system, mode, False, note=f"{short} of {len(load.jobs)} answers are not {load.new_tokens} tokens"
            )
        found = Check(system, mode, True)
        agreed = 0
        for index in _spread(load.jobs):
            wanted, gaps = self._read(load.jobs[index], answers[index].tokens)
            for position, gap in enumerate(gaps):
                found.tokens += 1
                agreed += gap == 0
                if gap and not found.first:
                    name = load.jobs[index].adapter or "base"
                    found.first = (f"request {index} ({name}), token {position}: {answers[index].tokens[position]}, "
                                   f"not {wanted[position]}; gap {gap:.1e}")  # fmt: skip
                found.gap = max(found.gap, gap)
        found.share = agreed / found.tokens
        found.passed = found.gap <= TIE
        return found

    @torch.inference_mode()
    def _read(self, job: Job, tokens: Sequence[int]) -> tuple[list[int], list[float]]:
        """What it would have chosen behind each prefix, and how far what was chosen is from that."""
        ids = torch.tensor([[*job.prompt, *tokens]])
        logits = self._model(job.adapter)(input_ids=ids).logits[0, len(job.prompt) - 1 : -1].float()
        best, wanted = logits.max(dim=1)
        chosen = logits.gather(1, torch.tensor(list(tokens))[:, None])[:, 0]
        gaps = (best - chosen) / logits.abs().max(dim=1).values
        return wanted.tolist(), torch.where(wanted == torch.tensor(list(tokens)), 0.0, gaps.clamp_min(1e-12)).tolist()

    def _model(self, adapter: str | None) -> nn.Module:
        if adapter not in self._merged:
            while len(self._merged) >= _MOST_MODELS:
                self._merged.pop(next(iter(self._merged)))
            model = AutoModelForCausalLM.from_pretrained(self._directory / "base", dtype=torch.float32)
            self._merged[adapter] = _merge(model, self._directory / "adapters" / adapter if adapter else None).eval()
        return self._merged[adapter]


def _merge(model: nn.Module, adapter: Path | None) -> nn.Module:
    if adapter is None:
        return model
    if (adapter / "adapter_config.json").exists():
        import peft

        return peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()  # type: ignore[no-any-return]
    return _replace_experts(model, adapter)


def _replace_experts(model: nn.Module, adapter: Path) -> nn.Module:
    """ESFT: the tuned experts' own weights in place of the base's."""
    tensors = {
        name.removeprefix("model."): it
        for file in adapter.glob("*.safetensors")
        for name, it in load_file(file).items()
    }
    for layer, experts in json.loads((adapter / "expert_cfg.json").read_text())["experts"].items():
        stacked = model.get_submodule(f"model.layers.{layer}.mlp.experts")
        for expert in experts:
            prefix = f"layers.{layer}.mlp.experts.{expert}"
            gate, up, down = (tensors[f"{prefix}.{it}_proj.weight"] for it in ("gate", "up", "down"))
            stacked.gate_up_proj.data[expert] = torch.cat([gate, up])  # type: ignore[operator]
            stacked.down_proj.data[expert] = down  # type: ignore[operator]
    return model


def _spread(jobs: Sequence[Job]) -> list[int]:
    """Indices of at most SAMPLE requests: one of each adapter first, then the next."""
    by_adapter: dict[str | None, list[int]] = {}
    for index, job in enumerate(jobs):
        by_adapter.setdefault(job.adapter, []).append(index)
    turns = max(map(len, by_adapter.values()))
    order = [its[turn] for turn in range(turns) for its in by_adapter.values() if turn < len(its)]
    return order[:SAMPLE]


def counted(system: str, mode: str, found: int, wanted: int) -> Check:
    """Where nothing is computed whose value could be wrong: that all of it was there."""
    return Check(system, mode, found == wanted, note=f"{found:,} of {wanted:,} counted")
