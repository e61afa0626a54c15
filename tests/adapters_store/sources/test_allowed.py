"""What an operator allows, to the letter."""

import pytest

from adapters_store.errors import SourceRefused
from adapters_store.sources.allowed import allowed_reference, parse_allowed

ALLOWED = parse_allowed(["hub:my-org/*", "hub:other/lora-*-v1", "s3:bucket/team/**", "s3:exact/a/b"])


@pytest.mark.parametrize(
    ("text", "source", "target", "rest"),
    [
        ("hub:my-org/a", "hub", "my-org/a", "my-org/a"),
        ("hub:my-org/a@main", "hub", "my-org/a", "my-org/a@main"),
        ("hub:my-org/a@refs/pr/1", "hub", "my-org/a", "my-org/a@refs/pr/1"),
        ("hub:other/lora-x-v1", "hub", "other/lora-x-v1", "other/lora-x-v1"),
        ("s3:bucket/team/a", "s3", "bucket/team/a", "bucket/team/a"),
        ("s3:bucket/team/a/b/run=5", "s3", "bucket/team/a/b/run=5", "bucket/team/a/b/run=5"),
        ("s3:exact/a/b", "s3", "exact/a/b", "exact/a/b"),
    ],
)
def test_what_is_allowed(text: str, source: str, target: str, rest: str) -> None:
    assert allowed_reference(text, ALLOWED) == (source, target, rest)


@pytest.mark.parametrize(
    "text",
    [
        "", "hub", "hub:", ":my-org/a", "my-org/a", "HUB:my-org/a", "hub:My-org/a", "hub:my-org", "hub:my-org/a/b",
        "hub:my-org/", "hub:/my-org/a", "hub:my-org//a", "hub:my-org/a/", "hub:my-org/..", "hub:my-org/../evil/a",
        "hub:my-org/.a", "hub:my-org/a..b", "hub:evil/a@my-org/a", "hub:my-org/a@", "hub:my-org/a@x@y",
        "hub:my-org/a@../b", "hub:my-org@evil/a", "hub:my-org/a b", "hub:my-org/a\n", "hub:my-org/a\0", "hub:my-org/ä",
        "hub:my-org/a?x", "hub:my-org/a#x", "hub:my-org/a%2e", "hub:my-org\\a", "hub:hub:my-org/a", "hub://my-org/a",
        "hub:https://my-org/a", "hub:my-org:80/a", "hub:evil/my-org/a", "hub:other/lora-x-v2", "hub:other/xlora-a-v1",
        "hub:other/lora-a-v1x", "s3:bucket/team", "s3:bucket/teamx/a", "s3:exact/a/b/c", "s3:exact/a", "s3:exactxa/b",
        "file:my-org/a", "s3:my-org/a", "hub:*/*", "hub:my-org/*",
        f"hub:my-org/{'a' * 129}", "s3:bucket/team" + "/a" * 600,
    ],
)  # fmt: skip
def test_what_is_not(text: str) -> None:
    with pytest.raises(SourceRefused):
        allowed_reference(text, ALLOWED)


def test_nothing_is_allowed_unless_somebody_says_so() -> None:
    with pytest.raises(SourceRefused, match="'hub:a/b' is not among what this server may fetch"):
        allowed_reference("hub:a/b", parse_allowed([]))


def test_patterns_of_one_source_add_up() -> None:
    assert parse_allowed(["hub:a/*", "s3:b/**", "hub:c/d"]) == {"hub": ("a/*", "c/d"), "s3": ("b/**",)}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hub",
        "hub:",
        "*:*",
        "a/b",
        "Hub:a/b",
        "hub:a/../b",
        "hub:a//b",
        "hub:a/b@main",
        "hub:a/b**",
        "hub:/a",
        "hub:a b",
    ],
)
def test_patterns_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="is no pattern"):
        parse_allowed(["hub:fine/*", text])
