"""Every family that is served, measured: `python -m tests.families` rewrites docs/models.md; with names, only shows."""

import argparse
import tempfile
import warnings
from pathlib import Path

from transformers.utils import logging

from tests.families import page
from tests.families.measure import Measured, measure
from tests.support.tiny_models import MODELS

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.families", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of tests/support/tiny_families.py; none: all of them")
    names = parser.parse_args().names
    unknown = sorted(set(names) - set(MODELS))
    if unknown:
        parser.error(f"there is no {', '.join(unknown)} in tests/support/tiny_families.py")
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    measured = [_shown(name) for name in names or MODELS]
    if not names:
        page.save(PAGE, page.write(measured))
    return int(not all(it.is_exact for it in measured))


def _shown(name: str) -> Measured:
    with tempfile.TemporaryDirectory() as directory:
        it = measure(name, Path(directory))
    found = ", ".join(f"{kind} {count}" for kind, count in it.exact.items())
    print(f"{name:28} {'exact' if it.is_exact else 'WRONG'}: {found}; {it.mechanisms}", flush=True)
    return it


if __name__ == "__main__":
    raise SystemExit(main())
