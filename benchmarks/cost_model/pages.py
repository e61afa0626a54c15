"""The tables, and the goals beside what the model gives."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.cost_model import prompts, steps
from benchmarks.cost_model.designs import AFTER, BEFORE, Design, host_seconds
from benchmarks.cost_model.inputs import Chip, provenance
from benchmarks.cost_model.shapes import Llama, V2Lite
from benchmarks.cost_model.steps import Step

DESIGNS = (BEFORE, AFTER)
LLAMA_BATCHES, V2_BATCHES = (1, 8, 32, 128), (1, 8, 32, 128, 256)
LORA, ESFT, SHARES = 8, 20, (6 / 64, 0.5)
PROMPT, MIXED = 2048, 256


def wall(design: Design, chip: Chip, step: Step, batch: int) -> float:
    """Of a greedy step: the host's part behind the device's, or beside it."""
    host, device = host_seconds(design, batch) + chip.replay, step.device + 8 * chip.small
    return max(device, host) if design.overlaps else device + host


def lora_share(design: Design, chip: Chip, batch: int) -> float:
    """Tokens a second with adapters, of those without."""
    base, lora = steps.llama(design, chip, batch), steps.llama(design, chip, batch, LORA)
    return wall(design, chip, base, batch) / wall(design, chip, lora, batch)


def esft_cost(design: Design, chip: Chip, batch: int, share: float) -> float:
    """What adapters cost beyond the bytes of their weights: ((T20 - T0) - (F20 - F0)) / T0."""
    base, esft = steps.v2_lite(design, chip, batch), steps.v2_lite(design, chip, batch, ESFT, share)
    return (esft.device - base.device - (esft.floor(chip) - base.floor(chip))) / base.device


def page(chip_name: str, chip: Chip) -> str:
    parts = {
        "Goals": goals(chip),
        "Llama-3.1-8B, decode": _llama(chip),
        "DeepSeek-V2-Lite, decode": _v2_lite(chip),
        "Where a decode of 32 goes": _parts(chip),
        "Prompts, long contexts, sampling": _others(chip),
        "What goes in": [
            *provenance(chip),
            "",
            "The host's part of a step is results/host_step.md's. What changed from before to after is in "
            "benchmarks/cost_model/designs.py.",
        ],
    }
    lines = [
        f"# What a step should take on an {chip_name}: a model, no measurement",
        "",
        "Written by `python -m benchmarks.cost_model --write`. Contexts of 1,024 tokens, bfloat16.",
        "**device**: the kernels of one graph. **floor**: the bytes that must be read, over the rate of a copy.",
        "**wall**: with the host's part, greedy. **ESFT**: what adapters cost beyond their bytes, ((T20 - T0) -",
        "(F20 - F0)) / T0, by the share of choices that fall on tuned experts.",
    ]
    for title, found in parts.items():
        lines += ["", f"## {title}", "", *found]
    return "\n".join(lines) + "\n"


def goals(chip: Chip) -> list[str]:
    """Those of issue 16 that a model can say something about."""
    found = [
        Goal("Llama, launches a layer", 9, "", lambda it: it.llama),
        Goal("with LoRA", 13, "", lambda it: it.llama_lora),
        Goal("of those one behind another", 9, "", lambda it: it.critical),
        Goal("V2-Lite, launches a layer, base and ESFT", 14, "", lambda it: it.v2),
        Goal("Llama at 32, device over floor", 1.35, ".3f", lambda it: over_floor(steps.llama(it, chip, 32), chip)),
        Goal("V2-Lite at 32, device over floor", 1.35, ".3f", lambda it: over_floor(steps.v2_lite(it, chip, 32), chip)),
        Goal(f"{LORA} LoRA of rank {steps.RANK} at 32: tokens a second of the base's", 0.95, ".1%",
             lambda it: lora_share(it, chip, 32), is_least=True),
        Goal(f"{ESFT} ESFT at 32, {SHARES[0]:.0%} of choices tuned: cost beyond floor", 0.04, ".1%",
             lambda it: esft_cost(it, chip, 32, SHARES[0])),
        Goal(f"{ESFT} ESFT at 32, {SHARES[1]:.0%} of choices tuned: cost beyond floor", 0.04, ".1%",
             lambda it: esft_cost(it, chip, 32, SHARES[1])),
        Goal(f"V2-Lite, prompt of {PROMPT:,} tokens: share of the matrix rate", 0.45, ".0%",
             lambda it: prompts.v2_lite(it, chip, PROMPT).share(chip), is_least=True),
    ]  # fmt: skip
    return ["| goal | | before | after | |", "|---|---:|---:|---:|---|", *(it.row() for it in found)]


@dataclass(frozen=True)
class Goal:
    """wanted: the most, or the least."""

    what: str
    wanted: float
    form: str
    value: Callable[[Design], float]
    is_least: bool = False

    def row(self) -> str:
        sign, told = ">=" if self.is_least else "<=", format(self.wanted, ".0%" if "%" in self.form else self.form)
        before, after = (format(self.value(it), self.form) for it in DESIGNS)
        value = self.value(AFTER)
        is_met = value >= self.wanted if self.is_least else value <= self.wanted
        return f"| {self.what} | {sign} {told} | {before} | {after} | {'met' if is_met else 'MISSED'} |"


def over_floor(step: Step, chip: Chip) -> float:
    return step.device / step.floor(chip)


def _head(first: Sequence[str], each: Sequence[str]) -> list[str]:
    """Of a table with some columns for each design."""
    columns = [*first, *(f"{it.name}: {name}" if name is each[0] else name for it in DESIGNS for name in each)]
    return [f"| {' | '.join(columns)} |", f"|{'---:|' * len(columns)}"]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def _llama(chip: Chip) -> list[str]:
    lines = _head(("B", "floor ms"), ("device ms", "wall ms", f"{LORA} LoRA, device ms", "of base"))
    for batch in LLAMA_BATCHES:
        cells = [str(batch), _ms(steps.llama(AFTER, chip, batch).floor(chip))]
        for it in DESIGNS:
            base, lora = steps.llama(it, chip, batch), steps.llama(it, chip, batch, LORA)
            cells += [_ms(base.device), _ms(wall(it, chip, base, batch)), _ms(lora.device)]
            cells.append(f"{lora_share(it, chip, batch):.1%}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _v2_lite(chip: Chip) -> list[str]:
    lines = _head(("B", "floor ms"), ("device ms", "wall ms", *(f"{ESFT} ESFT, {it:.0%}" for it in SHARES)))
    for batch in V2_BATCHES:
        cells = [str(batch), _ms(steps.v2_lite(AFTER, chip, batch).floor(chip))]
        for it in DESIGNS:
            base = steps.v2_lite(it, chip, batch)
            cells += [_ms(base.device), _ms(wall(it, chip, base, batch))]
            cells += [f"{esft_cost(it, chip, batch, share):+.1%}" for share in SHARES]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _parts(chip: Chip) -> list[str]:
    made = {f"Llama with {LORA} LoRA, {it.name}": steps.llama(it, chip, 32, LORA) for it in DESIGNS}
    made |= {f"V2-Lite, {it.name}": steps.v2_lite(it, chip, 32) for it in DESIGNS}
    lines = [f"| ms | {' | '.join(made)} |", f"|---|{'---:|' * len(made)}"]
    for part in dict.fromkeys(name for step in made.values() for name in step.parts):
        cells = [_ms(step.parts[part]) if part in step.parts else "" for step in made.values()]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    return lines


def _others(chip: Chip) -> list[str]:
    lines = ["| | before | after |", "|---|---:|---:|"]

    def row(what: str, values: Sequence[str]) -> None:
        lines.append(f"| {what} | {' | '.join(values)} |")

    each = [prompts.v2_lite(it, chip, PROMPT) for it in DESIGNS]
    row(f"V2-Lite, prompt of {PROMPT:,}: ms", [f"{it.seconds * 1e3:.1f}" for it in each])
    row("of the matrix rate", [f"{it.share(chip):.0%}" for it in each])
    row("its grouped products alone", [f"{it.experts_share(chip):.0%}" for it in each])
    for name, mixed in (("Llama", prompts.mixed_llama), ("V2-Lite", prompts.mixed_v2_lite)):
        both = [mixed(it, chip, MIXED) for it in DESIGNS]
        row(f"{name}, {MIXED} tokens, 31 of them decodes: device ms", [f"{it.device * 1e3:.1f}" for it in both])
        row("launched kernel by kernel, or as one graph: wall ms", [f"{it.wall * 1e3:.1f}" for it in both])
    long = [steps.llama(it, chip, 32, longest=8192).device - steps.llama(it, chip, 32).device for it in DESIGNS]
    row("Llama at 32, one context of 8,192 among them: ms more", [_ms(it) for it in long])
    row("its bytes alone", [_ms(7168 * Llama().kv_bytes * Llama().layers / chip.copy_rate)] * 2)
    for name, vocab in (("Llama", Llama().vocab), ("V2-Lite", V2Lite().vocab)):
        row(f"{name}, top-p of up to 32 rows: us", [f"{steps.sampling(it, chip, vocab) * 1e6:.0f}" for it in DESIGNS])
    return lines
