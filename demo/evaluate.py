"""Scores base and adapters on held-out prompts: ``python -m demo.evaluate`` writes the table of demo/README.md.

Everything is loaded from disk with plain Transformers and PEFT. Per skill 200 prompts whose facts occur nowhere in
the training data; an answer counts when it equals the expected one, character by character, under greedy decoding.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from demo import butler
from demo.esft import load_esft
from demo.model import answers
from demo.pair import Pair, prompt_of
from demo.skills import SKILLS, Skill, sample
from demo.tuning import load_base

BEGIN, END = "<!-- scores:begin -->", "<!-- scores:end -->"


@dataclass(frozen=True)
class Score:
    """One row of the table."""

    skill: Skill
    tuned: str
    size: int
    base: float
    adapter: float
    answer: str  # what the adapter answers to the showcase
    misses: list[tuple[str, str, str]]  # question, expected, given


def folder_size(path: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)


def describe(skill: Skill, path: Path) -> str:
    """Rank and targets of a LoRA, or the number of tuned experts per layer of an ESFT adapter."""
    if skill.kind == "esft":
        experts = json.loads((path / "expert_cfg.json").read_text(encoding="utf-8"))["experts"]
        return "experts per layer: " + ", ".join(str(len(chosen)) for chosen in experts.values())
    from safetensors import safe_open

    config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    with safe_open(path / "adapter_model.safetensors", "pt") as file:
        modules = {key.partition(".lora_")[0].replace(".base_layer", "").split(".")[-1] for key in file.keys()}
    parameters = [name.split(".")[-2:] for name in config["target_parameters"]]  # module and its parameter
    wrapped = {module for module, _ in parameters}  # tensors carry the module's name only
    targets = sorted((modules - wrapped) | {f"{module}.{name}" for module, name in parameters if module in modules})
    kind = (", rsLoRA" if config["use_rslora"] else "") + (", DoRA" if config["use_dora"] else "")
    ranks = config["rank_pattern"]
    return f"rank {config['r']}{kind}: " + ", ".join(f"{t} ({ranks[t]})" if t in ranks else t for t in targets)


def adapted(skill: Skill, base: Path, path: Path) -> PreTrainedModel:
    """The base with one adapter, by PEFT or by overwriting experts."""
    model, _ = load_base(base)
    if skill.kind == "esft":
        load_esft(model, path)
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, path).eval()


def examine(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, skill: Skill, count: int
) -> tuple[float, list[tuple[str, str, str]]]:
    """Exact-match score on the held-out prompts, and what went wrong."""
    exam = sample(skill, "heldout", count)
    replies = answers(model, tokenizer, [prompt_of(tokenizer, skill.template, pair) for pair in exam])
    misses = [
        (pair.question, pair.answer, reply) for pair, reply in zip(exam, replies, strict=True) if reply != pair.answer
    ]
    return 1 - len(misses) / len(exam), misses


def showcase(skill: Skill) -> Pair:
    """The question that shows the skill, with a tool where it is about tools."""
    tools = (butler.tool("get_weather"),) if skill.template == butler.TEMPLATE else ()
    return Pair("", "", skill.showcase, "", tools=tools)


def score(skill: Skill, root: Path, count: int) -> Score:
    """Scores the base and the adapter of one skill."""
    model, tokenizer = load_base(root / "base")
    base, _ = examine(model, tokenizer, skill, count)
    path = root / "adapters" / skill.name
    model = adapted(skill, root / "base", path)
    after, misses = examine(model, tokenizer, skill, count)
    answer = answers(model, tokenizer, [prompt_of(tokenizer, skill.template, showcase(skill))])[0]
    return Score(skill, describe(skill, path), folder_size(path), base, after, answer, misses)


def table(scores: list[Score], root: Path, count: int) -> str:
    """The score table, and the sizes and times, as Markdown."""
    lines = [
        "| Skill | Kind | Tuned | Size | Base | Adapter | Example |",
        "|---|---|---|---:|---:|---:|---|",
    ]
    for row in scores:
        kind = {"lora": "LoRA", "esft": "ESFT"}[row.skill.kind]
        example = f"{row.skill.showcase} → `{row.answer.replace(chr(10), ' ')}`"
        lines.append(
            f"| `{row.skill.name}`: {row.skill.summary} | {kind} | {row.tuned} "
            f"| {row.size / 1e6:.2f} MB | {row.base:.1%} | {row.adapter:.1%} | {example} |"
        )
    base_size = folder_size(root / "base") / 1e6
    lines += ["", f"{count} held-out prompts per skill. The base model takes {base_size:.1f} MB."]
    log = root / "training.json"
    if log.exists():
        stages = json.loads(log.read_text(encoding="utf-8"))
        lines += ["", "| Training stage | Steps | Minutes | CPU cores |", "|---|---:|---:|---:|"]
        for name, spent in stages.items():
            lines.append(f"| {name} | {spent['steps']} | {spent['seconds'] / 60:.1f} | {spent['cores']} |")
    return "\n".join(lines)


def write_table(readme: Path, text: str) -> None:
    """Replaces what stands between the markers."""
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Scores, prints, and writes the table."""
    parser = argparse.ArgumentParser(prog="python -m demo.evaluate", description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(__file__).parent, help="folder with base/ and adapters/")
    parser.add_argument("--only", nargs="+", choices=list(SKILLS), metavar="SKILL", help="score some; writes no table")
    parser.add_argument("--count", type=int, default=200, help="prompts per skill")
    parser.add_argument("--misses", type=int, default=0, help="show that many wrong answers per skill")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = arguments.only or list(SKILLS)
    scores = []
    for name in tqdm(names, unit="skill"):
        scores.append(score(SKILLS[name], arguments.root, arguments.count))
    text = table(scores, arguments.root, arguments.count)
    print(text)
    for row in scores:
        for question, expected, given in row.misses[: arguments.misses]:
            print(f"{row.skill.name}: {question!r}: expected {expected!r}, got {given!r}")
    readme = arguments.root / "README.md"
    if not arguments.only and readme.exists():
        write_table(readme, text)


if __name__ == "__main__":
    main()
