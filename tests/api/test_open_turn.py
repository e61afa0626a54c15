"""A turn of the model's own that has begun: what a template writes behind it is cut off, and nothing else."""

from collections.abc import Callable

import pytest

from server.api.texts.open_turn import OpenTurn
from server.errors import InvalidRequest


def cut(begun: str, render: Callable[[str], str]) -> str:
    turn = OpenTurn([{"role": "user", "content": "hi"}, {"role": "assistant", "content": begun}])
    assert turn.messages[0]["content"] == "hi" and turn.messages[1]["role"] == "assistant"
    return turn.cut(render(turn.messages[1]["content"]))


@pytest.mark.parametrize(
    ("begun", "render", "left"),
    [
        ("Hel", lambda it: f"<a>{it}<end>", "<a>Hel"),
        ("Hel ", lambda it: f"<a>{it.strip()}<end>", "<a>Hel "),
        (" Hel", lambda it: f"<a>{it.strip()}<end>", "<a>Hel"),
        ("", lambda it: f"<a>{it}<end>", "<a>"),
        ("end", lambda it: f"<a>{it}<end>", "<a>end"),
    ],
)
def test_the_prompt_ends_with_the_turns_last_letter(begun: str, render: Callable[[str], str], left: str) -> None:
    assert cut(begun, render) == left


@pytest.mark.parametrize(
    "render",
    [lambda it: "<a>", lambda it: f"{it}{it}", lambda it: it[1:], lambda it: it[:9], lambda it: it.upper()],
)
def test_a_template_that_writes_something_else_cannot_be_cut(render: Callable[[str], str]) -> None:
    with pytest.raises(InvalidRequest, match="could not continue it"):
        cut("Hello there", render)
