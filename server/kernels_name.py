"""The name `kernels` belongs to two packages: ours, and one that Transformers looks for. Keep them apart.

Transformers asks whether a distribution called `kernels` is installed and, in a window of its versions, imports names
from it while it imports model code. Whatever it would find (ours, or a foreign one beside ours) breaks the import.
"""

import importlib.util
from pathlib import Path

from server.errors import ConfigError

_OURS = Path(__file__).resolve().parent.parent / "kernels"


def check_kernels_are_ours() -> None:
    """Raise ConfigError if another package of that name is found first."""
    spec = importlib.util.find_spec("kernels")
    found = [Path(place).resolve() for place in (spec.submodule_search_locations or ())] if spec else []
    if not found or found[0] != _OURS:
        where = str(found[0]) if found else "nowhere"
        raise ConfigError(
            f"the package 'kernels' is found in {where}, not in {_OURS}: another distribution of that name hides "
            "Heddle's own. Uninstall it (pip uninstall kernels), or install Heddle in a virtual environment of its own"
        )


def keep_transformers_off() -> None:
    """Tell Transformers that there is no `kernels` distribution. Before the first import of model code."""
    import transformers.utils
    import transformers.utils.import_utils

    def not_available(*_: object, **__: object) -> bool:
        return False

    transformers.utils.is_kernels_available = not_available
    transformers.utils.import_utils.is_kernels_available = not_available
