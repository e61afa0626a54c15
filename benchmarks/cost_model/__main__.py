"""python -m benchmarks.cost_model"""

import argparse
import sys
from pathlib import Path

import benchmarks.cost_model
from benchmarks.cost_model.inputs import CHIPS
from benchmarks.cost_model.pages import page

RESULTS = Path(__file__).parents[1] / "results" / "cost_model.md"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost_model", description=benchmarks.cost_model.__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--write", action="store_true", help="rewrite the committed page")
    parser.add_argument("--chip", choices=tuple(CHIPS), default="H200")
    options = parser.parse_args()
    text = page(options.chip, CHIPS[options.chip])
    print(text)
    if options.write:
        RESULTS.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
