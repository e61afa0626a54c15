"""What a step costs its thread can be measured, part by part, with the engine as it is."""

from benchmarks.host_step import PARTS, SAMPLINGS, a_link, measured, page, rows_of_others


def test_every_part_of_a_step_takes_its_time_and_they_are_the_whole() -> None:
    with a_link() as link:
        taken = measured(4, SAMPLINGS["sampled"], link, steps=8)
    assert list(taken) == ["all", *(name for name, _ in PARTS)]
    assert all(it > 0 for it in taken.values()), taken


def test_a_page_keeps_what_was_measured_under_other_names() -> None:
    rows = ["| before | 32 | greedy | 9 |", "| after | 32 | greedy | 5 |"]
    assert rows_of_others(page(rows), "after") == rows[:1]
