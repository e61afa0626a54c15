"""Runs the suite and rewrites the page: see the package."""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.schema_suite import cases, page
from tests.schema_suite.measure import measure

PAGE = Path(__file__).resolve().parents[2] / "docs" / "structured-output.md"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.schema_suite", description=__doc__)
    parser.add_argument("--archive", type=Path, help="that carries the suite; without it, it is fetched")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        columns = measure(cases.read(options.archive or cases.fetch(Path(folder))))
    PAGE.write_text(page.rewritten(PAGE.read_text(), columns))
    unexplained = [it for column in columns.values() for it in column.unexplained]
    print(page.tables(columns), *unexplained, sep="\n")
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
