"""What was asked of the GPU step, beside what was measured. Written into summary.md from the rows of all sections."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Rows = Mapping[str, Sequence[Row]]  # of each section that has run
Found = tuple[float, str]  # a figure, and of what it is

BATCH = 32


@dataclass(frozen=True)
class Goal:
    """found: the figure that decides, the worst where there are several; None: its section has not got so far."""

    what: str
    wanted: float
    found: Callable[[Rows], Found | None]
    is_least: bool = False
    form: str = ".1%"

    def row(self, rows: Rows) -> Row:
        sign = ">=" if self.is_least else "<="
        told = {"goal": self.what, "wanted": f"{sign} {self.wanted:{self.form.replace('.1%', '.0%')}}"}
        found = self.found(rows)
        if found is None:
            return told | {"measured": "", "of": "", "": "not measured"}
        value, of = found
        is_met = value >= self.wanted if self.is_least else value <= self.wanted
        return told | {"measured": f"{value:{self.form}}", "of": of, "": "met" if is_met else "MISSED"}


def table(rows: Rows) -> list[Row]:
    return [goal.row(rows) for goal in GOALS]


def _decodes(rows: Rows, section: str, name: str, batch: int | None = None) -> list[Row]:
    return [it for it in rows.get(section, ()) if it.get("decode") == name and batch in (None, it["batch"])]


def _one(rows: Rows, section: str, name: str) -> Row | None:
    return next(iter(_decodes(rows, section, name, BATCH)), None)


def _esft(name: str) -> Callable[[Rows], Found | None]:
    def found(rows: Rows) -> Found | None:
        all_batches = _decodes(rows, "esft", name)
        worst = max(all_batches, key=lambda it: it["cost beyond floor"], default=None)
        return (worst["cost beyond floor"], f"batch {worst['batch']}") if worst else None

    return found


def _lora(rows: Rows) -> Found | None:
    base, lora = _one(rows, "lora", "0 LoRA"), _one(rows, "lora", "8 LoRA")
    return (lora["tokens/s"] / base["tokens/s"], f"batch {BATCH}") if base and lora else None


def _resident(section: str, alone: str, beside: str) -> Callable[[Rows], Found | None]:
    def found(rows: Rows) -> Found | None:
        base, with_them = _one(rows, section, alone), _one(rows, section, beside)
        return (with_them["device ms"] / base["device ms"] - 1, beside) if base and with_them else None

    return found


def _over_floor(section: str, name: str) -> Callable[[Rows], Found | None]:
    def found(rows: Rows) -> Found | None:
        row = _one(rows, section, name)
        return (row["device ms"] / row["floor ms"], f"batch {BATCH}") if row else None

    return found


def _decode_kernels(op: str, names: Sequence[str]) -> Callable[[Rows], Found | None]:
    def found(rows: Rows) -> Found | None:
        of_op = [it for it in rows.get("ops", ()) if it.get("op") == op and "share of ceiling" in it]
        cases = [it for it in of_op if it["case"].startswith(tuple(names))]
        worst = min(cases, key=lambda it: it["share of ceiling"], default=None)
        return (worst["share of ceiling"], worst["case"]) if worst else None

    return found


def _prompt(rows: Rows) -> Found | None:
    row = next((it for it in rows.get("esft", ()) if it.get("prompt") == "base"), None)
    return (row["share of peak"], f"{row['tokens']} tokens") if row else None


_DECODES = [f"{name} {tokens} tokens" for name in ("gate_up", "down") for tokens in (32, 128)]
GOALS = (
    Goal("20 ESFT: cost beyond floor, few picks on tuned experts", 0.04, _esft("20 ESFT")),
    Goal("20 ESFT: cost beyond floor, half of them", 0.04, _esft("20 ESFT, router favours the tuned")),
    Goal("8 LoRA of rank 16: tokens a second of the base's", 0.95, _lora, is_least=True),
    Goal("base alone, 20 ESFT on the device: slower by", 0.01, _resident("esft", "0 ESFT", "base, 20 resident")),
    Goal("base alone, 32 LoRA on the device: slower by", 0.01, _resident("lora", "0 LoRA", "base, 32 resident")),
    Goal("grouped products at decode, of copy bandwidth", 0.8, _decode_kernels("grouped_gemm", _DECODES),
         is_least=True),
    Goal("attention at decode, of copy bandwidth", 0.8,
         _decode_kernels("paged_attention", ("llama decode", "latent decode")), is_least=True),
    Goal("DeepSeek-V2-Lite, a prompt: share of the matrix rate", 0.45, _prompt, is_least=True),
    Goal("Llama-3.1-8B decode, device over floor", 1.35, _over_floor("lora", "0 LoRA"), form=".2f"),
    Goal("DeepSeek-V2-Lite decode, device over floor", 1.35, _over_floor("esft", "0 ESFT"), form=".2f"),
)  # fmt: skip
