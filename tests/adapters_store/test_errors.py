"""How refusals are worded: cleaned, cut, counted."""

import pytest

from adapters_store.errors import AdapterError, Unforeseen, clean, coverage_error, shown


@pytest.mark.parametrize(
    ("text", "max_bytes", "kept"),
    [
        ("x" * 100, 100, "x" * 100),
        ("x" * 101, 100, "x" * 97 + "…"),
        ("ü" * 50, 100, "ü" * 50),
        ("ü" * 51, 100, "ü" * 48 + "…"),
        ("ü\x00漢\n", 100, "ü\\x00漢\\n"),
        ("\ud800", 100, "\\ud800"),
        ("\x00" * 25, 100, "\\x00" * 25),
        ("\x00" * 26, 100, ("\\x00" * 25)[:97] + "…"),
        ("\u202e", 100, "\\u202e"),
        ("", 100, ""),
    ],
)
def test_text_of_strangers_is_shown_printable_and_in_so_many_bytes(text: str, max_bytes: int, kept: str) -> None:
    assert clean(text, max_bytes) == kept
    assert len(kept.encode()) <= max_bytes


def test_a_name_is_cut_to_120_characters() -> None:
    assert shown("x" * 120) == "x" * 120
    assert shown("x" * 121) == "x" * 119 + "…"


def test_every_message_is_cleaned() -> None:
    assert str(AdapterError("a\x1bb")) == "a\\x1bb"
    assert len(str(AdapterError("x" * 5000))) == 1998  # 1,997 and a mark of three bytes


@pytest.mark.parametrize(
    ("problems", "bound", "total", "remedies", "message"),
    [
        (["p"], 3, 5, [], "2 of the adapter's tensors do not fit this base (3 do): p"),
        (["p"], 5, 5, [], "all 5 tensors of the adapter fit this base, but it is not whole: p"),
        (["p", "q"], 0, 1, ["r"], "1 of the adapter's tensors do not fit this base (0 do): p; q. To do: r"),
        (["p"] * 6, 0, 6, ["r", "s", "t"],
         f"6 of the adapter's tensors do not fit this base (0 do): {'; '.join('pppppp')}. To do: r. To do: s. To do: "
         "t"),
        (["p"] * 7, 0, 7, ["r", "s", "t", "u"],
         f"7 of the adapter's tensors do not fit this base (0 do): {'; '.join('pppppp')}; and 1 more. To do: r. To do: "
         "s. To do: t"),
        (["p"] * 20, 0, 20, [],
         f"20 of the adapter's tensors do not fit this base (0 do): {'; '.join('pppppp')}; and 14 more"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_counted_and_listed_in_part(
    problems: list[str], bound: int, total: int, remedies: list[str], message: str
) -> None:
    assert str(coverage_error(problems, bound, total, remedies)) == message


def test_what_to_do_is_said_whatever_the_length_of_what_is_wrong() -> None:
    message = str(coverage_error(["ü" * 400] * 6, 0, 6, ["the remedy"]))
    assert message.endswith("…. To do: the remedy") and 1990 < len(message.encode()) <= 2000


def ping(depth: int) -> None:
    if not depth:
        raise KeyError("at the bottom\x1b")
    pong(depth - 1)


def pong(depth: int) -> None:
    ping(depth)


def test_what_nobody_had_thought_of_keeps_the_end_of_its_traceback_for_the_log() -> None:
    with pytest.raises(KeyError) as raised:
        ping(20)
    unforeseen = Unforeseen(raised.value)
    assert str(unforeseen) == "the adapter could not be verified (KeyError); the server's log says more"
    assert unforeseen.details.endswith(r"KeyError: 'at the bottom\x1b'\n") and "\x1b" not in unforeseen.details
    assert unforeseen.details.startswith("  File ") and unforeseen.details.count(r"\n  File ") == 10
    # eleven pieces, and the error, which is the twelfth
    assert len(Unforeseen(KeyError("x" * 9000)).details.encode()) == 8000
