"""Runs the census, or a part of it: see the package."""

import argparse
import json
import logging
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from tests.census import page
from tests.census.families import FAMILIES
from tests.census.made import Section
from tests.census.measure import Bench, Cell
from tests.census.sections import SECTIONS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "adapters.md"


def measure(sections: Sequence[Section], families: Sequence[str], rows: str, root: Path) -> list[Cell]:
    """Family by family, so that what a family's rows share is made once. Rows are those whose name has the pattern."""
    work = [(family, section) for family in families for section in sections]
    benches = {family: Bench(FAMILIES[family], root / family) for family in families}
    cells: list[Cell] = []
    for family, section in tqdm(work, unit="column", disable=not sys.stderr.isatty()):
        for number, row in enumerate(section.rows):
            if re.search(rows, row.name):
                cells.append(benches[family].measure(section.key, number, row))
    return cells


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.census", description=__doc__)
    keys = [section.key for section in SECTIONS]
    parser.add_argument("--section", nargs="+", choices=keys, default=keys)
    parser.add_argument(
        "--rows", default="", metavar="PATTERN", help="only rows whose name has this regular expression"
    )
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--out", type=Path, help=f"the page; by default {PAGE.name}, and for a part of the census none")
    parser.add_argument("--json", type=Path, help="every cell with its message")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("peft").setLevel(logging.ERROR)
    sections = [section for section in SECTIONS if section.key in options.section]
    is_whole = not options.rows and sections == list(SECTIONS) and len(options.families) == len(FAMILIES)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as made:
        cells = measure(sections, options.families, options.rows, Path(made))
    text = page.write(sections, cells)
    out = options.out or (PAGE if is_whole else None)
    if out is not None:
        page.save(out, text)
    if options.json is not None:
        described = {"versions": page.versions(), "counts": page.counts(cells), "cells": [asdict(it) for it in cells]}
        options.json.write_text(json.dumps(described, indent=1) + "\n")
    if out is None:
        print(text)
    print(page.summary(sections, cells), file=sys.stderr)
    print(f"{len(cells)} cells in {time.monotonic() - start:.0f} s", file=sys.stderr)
    return 1 if any(cell.result in ("WRONG", "failed") for cell in cells) else 0


if __name__ == "__main__":
    sys.exit(main())
