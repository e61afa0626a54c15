"""What the pages point to is there: files, headings, options."""

import re
from pathlib import Path

import pytest

from server import cli
from tests.support.live_server import ROOT

PAGES = sorted(
    page for folder in (".", "docs", "demo", "benchmarks", "benchmarks/gpu") for page in (ROOT / folder).glob("*.md")
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
ADAPTERS, STORE = ("list", "add", "remove", "verify", "gc"), ("backup", "log")
OTHERS_OPTIONS = {  # of pip, docker, journalctl and our own scripts
    "--only", "--out", "--jobs", "--seed", "--resume", "--write", "--toy", "--ops", "--once", "--section", "--gpus",
    "--no-deps", "--only-binary", "--python-version", "--platform", "--no-index", "--target",
}  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if heading:
            assert heading in _headings(target), link


def test_options_that_the_pages_name_exist(capsys: pytest.CaptureFixture[str]) -> None:
    known = {"--version"}
    for command in (["serve"], ["base-id"], *(["adapters", it] for it in ADAPTERS), *(["store", it] for it in STORE)):
        with pytest.raises(SystemExit):
            cli.main([*command, "--help"])
        known |= set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page.read_text())) - OTHERS_OPTIONS
        assert named <= known, page


def _headings(page: Path) -> set[str]:
    """As GitHub turns them into anchors."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
