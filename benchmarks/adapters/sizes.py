"""What 1, 4, 10 and 20 ESFT adapters take of a device, with as many experts in each layer as real ones tune.

"True size" is DeepSeek-V2-Lite in bfloat16 over a GPU's pages of 2 MiB: the server's table of experts asked over
pages that are only counted. An expert's matrices are 5.5 and 2.75 pages. The other rows are measured on this host, in
the engine's process: the same model with its width divided by 32, whose matrices are 5.5 and 2.75 of the host's pages
of 4 KiB too, and by 8. All of a model's experts and layers are there. Resident bytes are read of the arenas' mappings
in smaps, beside the account that the server gives over HTTP.

Fragmentation is the paper's: by how much the experts on the device exceed those that must be there, the base's and
the tuned ones. "Beyond tuned" leaves the base out of both. Padded: every adapter has room for the most experts that
any tunes in any layer. Merged: a whole model for each adapter, beside the base.
"""

from benchmarks.adapters import heddle
from benchmarks.adapters.counted import measure
from benchmarks.adapters.found import HEDDLE, Found, Row
from benchmarks.adapters.layouts import (
    LITE,
    LITE_KV_BYTES,
    LITE_OTHER_BYTES,
    Counts,
    Shape,
    adapters,
    base_bytes,
    excess,
    fragmentation,
    merged_bytes,
    padded_bytes,
    tokens_left,
    tuned_bytes,
)
from benchmarks.adapters.models import kv_bytes
from benchmarks.peers import plots
from benchmarks.peers.correctness import Judge
from benchmarks.peers.load import Check, Load, Sample, jobs
from benchmarks.peers.models import vocab_size
from benchmarks.peers.rounds import Plan, say
from benchmarks.peers.systems.heddle import HeddleSystem

TITLE = "Bytes of ESFT adapters"
COUNTS = (1, 4, 10, 20)
PAGE = 2 << 20  # of a GPU
GIB, MIB = 2**30, 2**20
BUDGETS = (64, 80, 140)  # GiB, of a device
FRAGMENTATION, BEYOND, PADDED = "fragmentation, %", "beyond tuned, %", "padded"
KV_BYTES, SPARE = 16 * MIB, 1.1
ASKED_TOKENS = 8  # of each adapter, so that it is loaded
_TRUE = "True size: bytes on the device, and tokens of KV cache in what is left"
_MEASURED = "Measured in the engine's process"
_PAPERS_PADDING = 50.2  # per cent, of the ten with their averages as they are printed (section 2.3)


def run(plan: Plan, found: Found) -> None:
    for number in COUNTS:
        _true_size(found, adapters(number, LITE.moe_layers), number)
    for scale in (32,) if plan.quick else (32, 8):
        _measured(plan, found, Shape(scale, 4), (1, 4) if plan.quick else COUNTS)
    drawn = [it for it in found.samples if it.mode.startswith("true size")]
    found.pictures["bytes"] = plots.bars(TITLE, FRAGMENTATION, drawn, found.checks)
    found.notes.append(
        f"A token's keys and values take {LITE_KV_BYTES:,} bytes. The budget is the device's whole memory: activations "
        "are not counted."
    )


def _true_size(found: Found, tuned: list[Counts], number: int) -> None:
    mode, pages = f"true size, {number}", measure(LITE, tuned, PAGE)
    _shares(found, mode, LITE, tuned, pages.mapped)
    wrong = _difference(pages.counted, pages.mapped, 0) or _difference(pages.after, 0, 0)
    paper = fragmentation(LITE, tuned, padded_bytes(LITE, tuned))
    if number == 10 and abs(paper - _PAPERS_PADDING) > 1:
        wrong = f"padding takes {paper:.1f} % more; the paper's adapters, {_PAPERS_PADDING} %"
    found.checks.append(Check(HEDDLE, mode, not wrong, note=wrong or "account and calls to the device agree"))
    if not wrong:
        found.tables.setdefault(_TRUE, []).extend(_layouts(tuned, number, pages.base + pages.mapped))


def _layouts(tuned: list[Counts], number: int, paged: int) -> list[Row]:
    """A row for each layout, of all that is on the device."""
    experts = base_bytes(LITE)
    taken = {
        "must be there": experts + tuned_bytes(LITE, tuned),
        "paged": paged,
        "padded": experts + padded_bytes(LITE, tuned),
        "merged copies": experts + merged_bytes(LITE, tuned, LITE_OTHER_BYTES),
    }
    rows: list[Row] = []
    for layout, size in taken.items():
        whole = LITE_OTHER_BYTES + size
        left = {f"KV tokens of {budget} GiB": _tokens(budget, whole) for budget in BUDGETS}
        rows.append({"adapters": str(number), "layout": layout, "GiB": whole / GIB, **left})
    return rows


def _tokens(budget: int, taken: int) -> str:
    return "does not fit" if taken > budget * GIB else f"{tokens_left(budget * GIB, taken, LITE_KV_BYTES):,}"


def _shares(found: Found, mode: str, shape: Shape, tuned: list[Counts], adapter_bytes: int) -> None:
    """What is mapped, and beside it what padding would take, which is arithmetic."""
    for system, size in ((HEDDLE, adapter_bytes), (PADDED, padded_bytes(shape, tuned))):
        figures = {FRAGMENTATION: fragmentation(shape, tuned, size), BEYOND: excess(shape, tuned, size)}
        found.samples.append(Sample(system, mode, 0, figures))
    found.checks.append(Check(PADDED, mode, True, note="computed"))


def _measured(plan: Plan, found: Found, shape: Shape, counts: tuple[int, ...]) -> None:
    """One server, to which adapters are added; each is asked, and what it answers is read by Transformers."""
    directory = plan.context.models.get(f"deepseek-{shape.scale}")
    tuned = adapters(max(counts), shape.moe_layers)
    room = int(SPARE * tuned_bytes(shape, tuned)) + MIB
    system = heddle.start(directory, plan.threads, heddle.memory_options(KV_BYTES, room, 0))
    judge, names = Judge(directory), [f"esft-{index}" for index in range(max(counts))]
    try:
        vocab = vocab_size(directory)
        # until each block of the KV cache has been written, so that none of its pages comes later
        most = 2 * KV_BYTES // kv_bytes(shape) // 160  # tokens that a request has, about
        system.run(Load(jobs(most, [], vocab, 701), ASKED_TOKENS))
        before = heddle.resident(heddle.engine(system))
        for number in counts:
            mode = f"1/{shape.scale} of the width, {number}"
            fresh = [it for it in names[:number] if it not in heddle.on_device(system)]
            heddle.register(system, fresh)
            load = Load(jobs(number, names[:number], vocab, 700, uniform=True), ASKED_TOKENS)
            answers = system.run(load)
            check = judge.check(HEDDLE, mode, load, answers)
            _resident(found, system, shape, tuned[:number], mode, before)
            found.checks.append(check)
            say(f"  {mode}: {found.samples[-2].figures}")
    finally:
        system.stop()


def _resident(
    found: Found, system: HeddleSystem, shape: Shape, tuned: list[Counts], mode: str, before: dict[str, int]
) -> None:
    now, account = heddle.resident(heddle.engine(system)), sum(heddle.on_device(system).values())
    grown = {part: now[part] - before[part] for part in now}
    _shares(found, mode, shape, tuned, grown["arenas"])
    wrong = _difference(grown["arenas"], account, account // 200)
    found.checks.append(Check(HEDDLE, mode, not wrong, note=wrong or "smaps and the server's account agree"))
    if not wrong:
        sizes = {"tuned experts": tuned_bytes(shape, tuned), "pages, by the server's account": account,
                 "growth of the arenas' mappings": grown["arenas"], "of the engine's RSS": grown["Rss"],
                 "PSS": grown["Pss"], "padded would take": padded_bytes(shape, tuned),
                 "merged copies of the experts": merged_bytes(shape, tuned, 0)}  # fmt: skip
        row: dict[str, float | str] = {"adapters": mode}
        row |= {f"{name}, MiB": size / MIB for name, size in sizes.items()}
        found.tables.setdefault(_MEASURED, []).append(row)


def _difference(one: int, other: int, allowed: int) -> str:
    """What is wrong with two figures that should be the same; empty where they are."""
    return f"{one:,} bytes, not {other:,}" if abs(one - other) > allowed else ""
