"""The trees of errors are drawn for people. Here they are derived from the classes, and the drawings held to them."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from adapters_store import errors as adapter_errors
from adapters_store.errors import AdapterError
from server import errors
from server.errors import ADAPTER_STATUS, HeddleError

ROOT = Path(__file__).resolve().parent.parent
ERRORS = (ROOT / "server" / "errors.py", ROOT / "adapters_store" / "errors.py")
Line = tuple[int, str, int | None]  # depth below the root of its tree, name, HTTP status


def drawn(module_doc: str | None, root: type[Exception]) -> list[Line]:
    """The tree below `root` as a docstring draws it."""
    _, _, below = (module_doc or "").partition(root.__name__)
    lines = []
    for line in below.splitlines()[1:]:
        match = re.match(r" *((?:│   |    )*[├└]── )(\w+) +(\d{3}\b)?", f"{line} ")
        if match is None:
            break
        lines.append((len(match[1]) // 4, match[2], int(match[3]) if match[3] else None))
    return lines


def derived(kind: type[Exception], depth: int = 1) -> Iterator[Line]:
    """The same of the classes, in the order of their definitions."""
    for child in kind.__subclasses__():
        if child.__module__.startswith(("server", "adapters_store")):
            yield depth, child.__name__, status_of(child)
            yield from derived(child, depth + 1)


def status_of(kind: type[Exception]) -> int | None:
    """None where a class has no status of its own: it never answers a request."""
    if issubclass(kind, HeddleError):
        return vars(kind).get("status")
    return next(ADAPTER_STATUS[it][0] for it in kind.__mro__ if it in ADAPTER_STATUS)


def test_all_our_errors_are_defined_in_two_files() -> None:
    ours = {kind.__name__ for kind in (HeddleError, AdapterError)}
    ours |= {name for kind in (HeddleError, AdapterError) for _, name, _ in derived(kind)}
    for folder in ("server", "adapters_store", "kernels"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                bases = node.bases if isinstance(node, ast.ClassDef) else []
                names = {ast.unparse(base).rpartition(".")[2] for base in bases}
                assert file in ERRORS or not names & ours, f"{file}: {ast.unparse(node)[:80]}"


def test_the_tree_is_what_its_drawing_says() -> None:
    for root in (HeddleError, AdapterError):
        assert drawn(errors.__doc__, root) == list(derived(root)) != []


def test_what_adapters_are_refused_for_is_what_its_drawing_says() -> None:
    names = [(depth, name) for depth, name, _ in derived(AdapterError)]
    assert [(depth, name) for depth, name, _ in drawn(adapter_errors.__doc__, AdapterError)] == names


def test_what_has_no_status_ends_the_start() -> None:
    assert {name for _, name, status in derived(HeddleError) if status is None} == {"ConfigError", "StartupError"}
