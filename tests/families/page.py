"""docs/models.md: what was measured of every family, between markers that `make families` writes."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from server.model.refused import REFUSED
from server.model.text_half import PARTS
from server.model.text_half import REFUSED as REFUSED_WHOLES
from tests.families.measure import Measured
from tests.families.names import KNOWN_AS
from tests.support.engine_harness import prompts

KEY = """*attention*: what a token sees, or latent (DeepSeek's cache), or borrowed (an earlier layer's keys and values).
*rope*: which elements form a pair, where ours computes it. *norm*, *gate*, *router*: what was recognised. **own** stays
as Transformers computes it, in some layers or in all. *LoRA*: on every linear that adapters may act on, so many of
them. *ESFT* is refused where experts are stored in another layout than it was made for."""
BEGIN, END = "<!-- begin: python -m tests.families -->", "<!-- end -->"


def write(measured: Sequence[Measured]) -> str:
    types = {it.model_type for it in measured}
    wrong = sorted({it.model_type for it in measured if not it.is_exact})
    told = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch"))
    says = f"**{len(types) - len(wrong)} families exact, {len(wrong)} wrong**"
    return "\n".join([
        f"{says}{': ' + ', '.join(wrong) if wrong else ''}, in {len(measured)} configurations. Measured with {told}.",
        "",
        "| family | known as | attention | rope | norm | gate | router | base | LoRA | expert LoRA | ESFT |",
        f"|---|---|{'---|' * 9}",
        *(_row(it) for it in sorted(measured, key=lambda it: it.name)),
        "",
        KEY,
        "",
        "## Text halves of multimodal types",
        "",
        f"{len(PARTS)} types, where the plain family inside is served:",
        ", ".join(f"`{name}`" for name in sorted(PARTS)) + ".",
        "",
        "## Not served, and what it would take",
        "",
        "| type | why |",
        "|---|---|",
        *(f"| `{name}` | {reason} |" for name, reason in sorted({**REFUSED, **REFUSED_WHOLES}.items())),
        "",
        "Types in neither table are refused as well, without a reason.",
    ])  # fmt: skip


def _row(it: Measured) -> str:
    made = it.mechanisms
    cells = [f"`{it.name}`", KNOWN_AS[it.model_type], made.attention, made.rope, made.norm, made.gate, made.router]
    cells += [_result(it, kind) for kind in ("base", "lora", "expert lora", "esft")]
    return f"| {' | '.join(cell or '–' for cell in cells)} |"


def _result(it: Measured, kind: str) -> str:
    if kind in it.refused:
        return "refused"
    if kind not in it.exact:
        return "–"
    asked = len(prompts())
    result = "exact" if it.exact[kind] == asked else f"**{it.exact[kind]} of {asked}**"
    return f"{result} ({it.targets})" if kind == "lora" else result


def save(file: Path, text: str) -> None:
    before, begin, rest = file.read_text().partition(BEGIN)
    assert begin, f"{file} lacks the marker {BEGIN}"
    file.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}")
