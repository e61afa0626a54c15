"""What adapters that come and go are measured by: arithmetic, what is not printed, and that it runs to its page."""

import ctypes
import json
import mmap
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.adapters import curves, fairness, neighbours, report, sizes, ttft
from benchmarks.adapters.__main__ import SECTIONS, main
from benchmarks.adapters.counted import measure
from benchmarks.adapters.found import HEDDLE, Found, all_right, over
from benchmarks.adapters.goals import GOALS
from benchmarks.adapters.heddle import arenas_of, counted
from benchmarks.adapters.layouts import (
    LITE,
    LITE_KV_BYTES,
    LITE_OTHER_BYTES,
    PROFILES,
    Profile,
    Shape,
    adapters,
    base_bytes,
    counts_of,
    excess,
    fragmentation,
    merged_bytes,
    most_of,
    padded_bytes,
    tokens_left,
    tuned_bytes,
)
from benchmarks.adapters.schedule import UNIFORM, ZIPF, hit_share, requests
from benchmarks.peers.goals import outcome
from benchmarks.peers.load import Answer, Check, Load, Sample
from benchmarks.peers.rounds import Plan
from benchmarks.peers.suites.neighbours import QUIET
from benchmarks.workload import Job
from server.weights.host_arena import HostPages
from tests.support.breadth import always

HEAD = {"date": "2026-01-01", "command": "c", "commit": "1", "machine": "m", "rounds": 2, "took_s": {}, "versions": {},
        "quick": False, "python": "3", "threads": 2}  # fmt: skip
SMALL = Shape(scale=32, itemsize=4, moe_layers=3, experts=8)


def test_the_model_has_the_sizes_of_the_real_one() -> None:
    assert LITE.expert_bytes == 17_301_504 and LITE_KV_BYTES == 31_104
    assert base_bytes(LITE) + LITE_OTHER_BYTES == pytest.approx(31.41e9, rel=1e-3)
    # 8.25 pages of the host an expert, as the real one is 8.25 pages of a GPU
    assert SMALL.expert_bytes / 4096 == LITE.expert_bytes / sizes.PAGE == 8.25


@pytest.mark.parametrize("profile", PROFILES, ids=lambda it: it.name)
def test_adapters_are_as_table_1_says(profile: Profile) -> None:
    counts = counts_of(profile, 26, seed=0)
    assert max(counts) == profile.most and min(counts) >= 2
    assert sum(counts) / 26 == pytest.approx(profile.average, abs=0.51 / 26)
    assert counts != counts_of(profile, 26, seed=1)


def test_layouts_are_counted_by_the_papers_formulas() -> None:
    tuned = [(1, 2, 3), (2, 2, 2)]
    one = SMALL.expert_bytes
    assert base_bytes(SMALL) == 24 * one and tuned_bytes(SMALL, tuned) == 12 * one
    assert most_of(tuned) == 3 and padded_bytes(SMALL, tuned) == 18 * one  # 3 layers x 2 adapters x 3
    assert merged_bytes(SMALL, tuned, 5) == 2 * (24 * one + 5)
    assert fragmentation(SMALL, tuned, tuned_bytes(SMALL, tuned)) == 0
    assert fragmentation(SMALL, tuned, padded_bytes(SMALL, tuned)) == pytest.approx(100 * (42 / 36 - 1))
    assert excess(SMALL, tuned, padded_bytes(SMALL, tuned)) == pytest.approx(50)
    assert tokens_left(1000, 900, 30) == 3 and tokens_left(900, 1000, 30) == 0
    # all ten of the paper's, padded: 1.502 times what must be there
    ten = adapters(10, 26)
    assert fragmentation(LITE, ten, padded_bytes(LITE, ten)) == pytest.approx(50.2, abs=0.5)


def test_the_servers_table_is_asked_over_pages_that_are_only_counted() -> None:
    tuned = [(1, 2, 3), (2, 2, 2)]
    told = measure(SMALL, tuned, mmap.PAGESIZE)
    # gate and up of one expert are 5.5 pages, down 2.75; an adapter begins on a page, in each of both
    pages = sum(-(-11 * count // 2) + -(-11 * count // 4) for counts in tuned for count in counts)
    assert told.mapped == told.counted == pages * mmap.PAGESIZE
    assert told.base == 3 * (44 + 22) * mmap.PAGESIZE and told.after == 0


def test_arenas_are_told_from_the_other_memory_of_a_process() -> None:
    size = 64 * mmap.PAGESIZE
    pages = HostPages()
    before = arenas_of(Path("/proc/self/smaps").read_text())
    address = pages.reserve(2 * size)
    try:
        pages.map(address, size)
        ctypes.memset(address, 1, size)
        other = bytes([1]) * size  # resident too, and no arena's
        assert other and arenas_of(Path("/proc/self/smaps").read_text()) - before == size
    finally:
        pages.release(address, 2 * size)


def test_a_metric_is_summed_over_its_series_and_refused_where_it_is_missing() -> None:
    text = '# TYPE a_total counter\na_total{adapter="x y"} 2.0\na_total{adapter="other"} 3.0\na_total_more 7\n'
    assert counted(text, "a_total") == 5
    assert counted("# TYPE a_total counter\n", "a_total") == 0
    with pytest.raises(LookupError, match="a_tot"):
        counted(text, "a_tot")


def test_requests_draw_adapters_by_popularity_and_prompts_by_seed() -> None:
    names = [f"a-{index}" for index in range(8)]
    uniform, zipf = (requests(4000, names, popularity, 100, seed=3) for popularity in (UNIFORM, ZIPF))
    shares = Counter(job.adapter for job in zipf)
    harmonic = sum(1 / (index + 1) for index in range(8))
    for index, name in enumerate(names):
        assert shares[name] / 4000 == pytest.approx(1 / (index + 1) / harmonic, rel=0.2)
    assert all(
        count / 4000 == pytest.approx(1 / 8, rel=0.15) for count in Counter(it.adapter for it in uniform).values()
    )
    prompts = [job.prompt for job in uniform]
    assert prompts == [job.prompt for job in zipf] == [job.prompt for job in requests(4000, [], "", 100, seed=3)]
    assert {len(it) for it in prompts} == set(range(32, 65))
    assert requests(2, [], "", 100, seed=3)[0].adapter is None


def test_hits_are_counted_once_the_room_is_full() -> None:
    assert hit_share(["a", "b", "a", "b"], 2) == 1
    assert hit_share(["a", "b", "c"] * 9, 2) == 0  # in turn: always the one that has just gone
    assert hit_share(["a", "b", "b", "c", "b"], 2) == pytest.approx(2 / 3)
    assert hit_share([], 2) == 1


def test_figures_of_a_cell_are_quantiles_of_its_requests() -> None:
    answers = [Answer([1, 2], 1.0, 2.0 + index / 100, [1.0 + index / 100, 2.0]) for index in range(1, 101)]
    told = ttft.told(Load([], 2), answers, cpu_seconds=4.0, loads=8.0)
    assert (told[ttft.P50], told[ttft.P90], told[ttft.P99]) == pytest.approx((500, 900, 990))
    assert told["tok/s"] == pytest.approx(100) and told["tok/CPU s"] == 50 and told["loads/s"] == pytest.approx(4)
    # a client that was half a second late does not make the server look quicker
    late = ttft.told(Load([], 2, [0.5] * 100), answers, cpu_seconds=4.0, loads=8.0)
    assert late[ttft.P50] == pytest.approx(1000)


def _found(*, wrong: str = "") -> Found:
    """Two rounds of all modes of the neighbours; the ratio to the quiet streams is 1.1 and 1.2."""
    modes = {QUIET: (10.0, 20.0), neighbours.ALL: (11.0, 24.0)}
    samples = [Sample(HEDDLE, mode, number, {neighbours.P99: value}, 0.1)
               for mode, values in modes.items() for number, value in enumerate(values)]  # fmt: skip
    checks = [Check(HEDDLE, mode, True, 1.0, 8) for mode in modes]
    checks.append(all_right(neighbours.ALL, [wrong] if wrong else [], 3))
    return Found(samples, checks)


def test_ratios_are_printed_with_their_spread_and_goals_are_read_off_them() -> None:
    found = _found()
    found.tables["Over"] = over(found, QUIET, neighbours.MODES[1:2] + (neighbours.ALL,), neighbours.COMPARED)
    page = report.page(HEAD, {"neighbours": found}, SECTIONS, {})
    assert "| all at once | – | 1.15 (1.10–1.20) | – | – |" in page
    assert "| neighbours | all at once: ITL p99 over quiet | ≤ 1.2 | 1.15 | met |" in page
    assert "not measured: heddle, evicted" in page and "smoke run" not in page


def test_a_wrong_answer_of_an_adapter_takes_the_figures_with_it() -> None:
    found = _found(wrong="evicted (esft-1): [1], not [2]")
    assert over(found, QUIET, neighbours.MODES, neighbours.COMPARED) == [
        {"beside": QUIET, "ITL p50 ms": "–", "ITL p99 ms": "1.00 (1.00–1.00)", "ITL max ms": "–", "tok/s": "–"}
    ]
    page = report.page(HEAD, {"neighbours": found}, SECTIONS, {})
    assert "| all at once | heddle | 2 | failed check |" in page and "evicted (esft-1): [1], not [2]" in page
    assert "| neighbours | all at once: ITL p99 over quiet | ≤ 1.2 | – | heddle, all at once: failed check |" in page
    assert not all_right("m", [], 0).passed  # nobody was asked: as good as wrong


def test_a_cell_with_a_wrong_answer_has_no_point_and_no_growth() -> None:
    kind = ttft.QUICK[0]
    cells = [ttft.Cell(kind, ttft.OPEN, UNIFORM, ratio) for ratio in ttft.RATIOS]
    samples = [Sample(HEDDLE, cell.mode, 0, {ttft.P50: 10.0 * cell.ratio, ttft.P99: 20.0}) for cell in cells]
    right = Found(samples, [Check(HEDDLE, cell.mode, True) for cell in cells])
    (p50, p99) = ttft.growth(right, [kind])
    assert p50 == {"adapters and load": "LoRA, open, uniform", "": ttft.P50, "2x": "2.00 (2.00–2.00)",
                   "4x": "4.00 (4.00–4.00)", "16x": "16.00 (16.00–16.00)"}  # fmt: skip
    assert p99["16x"] == "1.00 (1.00–1.00)"
    wrong = Found(samples, [replace(it, passed=it.mode != cells[3].mode) for it in right.checks])
    assert ttft.growth(wrong, [kind]) == []
    drawn, told = (curves.draw("t", ttft.lines(it, kind, ttft.OPEN), ttft.RATIOS) for it in (right, wrong))
    assert drawn.count("<circle") == 8 and told.count("<circle") == 6
    assert curves.draw("t", ttft.lines(Found(), kind, ttft.OPEN), ttft.RATIOS) == ""


def test_who_shares_is_asked_by_tokens_within_the_time_and_each_answer_is_as_alone() -> None:
    known: fairness.Known = {("lora-0", (7, 8)): [1, 2, 3]}
    answers = [(Job([7, 8], "lora-0"), Answer(tokens, 0.0, 3.0, times))
               for tokens, times in (([1, 2, 3], [0.9, 1.0, 2.0]), ([1, 2], [3.0, 3.1]))]  # fmt: skip
    assert fairness.per_s(answers, 1.0, 2.0) == 1.5  # three, in two seconds
    weighed, beside = "weights 1 and 3", fairness.MANY
    assert fairness.as_alone(weighed, answers, known).passed  # the second was cut off at the end
    assert not fairness.as_alone(beside, answers, known).passed  # where nobody cuts one off
    assert not fairness.as_alone(weighed, [(answers[0][0], Answer([1, 3], 0.0, 1.0, [1.0, 1.0]))], known).passed
    assert not fairness.as_alone(weighed, [], known).passed


def test_what_is_felt_of_a_flood_is_quantiles_of_times_to_first_tokens() -> None:
    answers = [Answer([1, 2, 3], 1.0, 3.0, [1.0 + index / 10, 2.5, 2.75]) for index in range(1, 11)]
    told = fairness.felt(answers)
    assert (told[fairness.P50], told[fairness.P90], told[fairness.WORST]) == pytest.approx((500, 900, 1000))
    goal = next(it for it in GOALS if it.of == (HEDDLE, fairness.LARGE))
    checks = [Check(HEDDLE, mode, True) for mode in (QUIET, fairness.LARGE)]
    for late, verdict in ((2.9, "met"), (3.1, "**not met**")):
        samples = [Sample(HEDDLE, mode, 0, {fairness.P90: ms}) for mode, ms in ((QUIET, 1.0), (fairness.LARGE, late))]
        assert outcome(goal, samples, checks).verdict == verdict


def test_each_size_that_is_printed_is_that_of_the_table_and_of_the_paper() -> None:
    found = Found()
    sizes._true_size(found, adapters(10, 26), 10)
    assert all(it.passed for it in found.checks)
    ours, padded = found.samples
    assert 0 < ours.figures[sizes.FRAGMENTATION] < 1 < 50 < padded.figures[sizes.FRAGMENTATION] < 51
    rows = {row["layout"]: row for row in next(iter(found.tables.values()))}
    assert (
        rows["padded"]["KV tokens of 64 GiB"] == "does not fit"
        and rows["paged"]["KV tokens of 64 GiB"] != "does not fit"
    )
    # a sample of adapters that is not the paper's is refused, and so is what is said of it
    other = Found()
    sizes._true_size(other, [(12,) * 26] * 10, 10)
    assert not all(it.passed for it in other.checks) and not other.tables
    goal = next(it for it in GOALS if it.of == (HEDDLE, "true size, 10"))
    assert outcome(goal, found.samples, found.checks).verdict == "met"
    assert outcome(goal, other.samples, other.checks).value is None


def test_a_section_that_fails_is_a_check_that_did_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(plan: Plan, found: Found) -> None:
        found.samples.append(Sample(HEDDLE, "true size, 1", 0, {sizes.FRAGMENTATION: 0.5}))
        raise LookupError("the server has no metric")

    monkeypatch.setattr(sizes, "run", broken)
    assert main(["--only", "bytes", "--results", str(tmp_path), "--name", "here", "--machine", "m"]) == 1
    (page,) = tmp_path.glob("*-here-adapters.md")
    assert "| true size, 1 | heddle | 1 | failed check |" in page.read_text()  # nobody had checked it
    assert "the section failed: LookupError: the server has no metric" in page.read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("only", always([["bytes"], [*SECTIONS]], ["bytes"]), ids=",".join)
def test_it_runs_to_its_page(tmp_path: Path, only: list[str]) -> None:
    asked = ["--quick", "--threads", "1", "--results", str(tmp_path), "--name", "here", "--only", ",".join(only)]
    assert main(asked) == 0
    (page,) = tmp_path.glob("*-here-adapters.md")
    told, text = json.loads(page.with_suffix(".json").read_text()), page.read_text()
    assert set(told["sections"]) == set(only)
    for section in told["sections"].values():
        assert section["samples"] and all(it["passed"] for it in section["checks"])
    assert "failed check |" not in text and "A smoke run" in text
    used = told["sections"]["neighbours"]["samples"] if "neighbours" in only else []
    assert all(it["figures"]["evicted/s"] and it["figures"]["loads/s"] for it in used if it["mode"] == "evicted")
    pictures = {"neighbours", "bytes", "ttft-lora-open", "ttft-lora-closed", "fairness-ttft", "fairness-weights"}
    drawn = {path.stem.partition("adapters-")[2] for path in tmp_path.glob("*.svg")}
    assert drawn == {it for it in pictures if it.partition("-")[0] in only}
