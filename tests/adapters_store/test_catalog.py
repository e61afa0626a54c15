"""Names and what they mean: who may have one, what giving it again does, and below which directories paths may lie."""

from pathlib import Path

import pytest

from adapters_store.catalog import Catalog
from adapters_store.errors import AdapterConflict, AdapterNotFound, AdapterPathRefused, InvalidAdapterName
from tests.support.adapter_files import BASE, lora


def test_catalogue_names(tmp_path: Path) -> None:
    catalog = Catalog("base", BASE, (tmp_path,))
    lora(tmp_path / "a"), lora(tmp_path / "b")
    entry = catalog.read("first", "a")
    assert catalog.add(entry) is True
    assert catalog.add(catalog.read("first", "a")) is False  # the same weights again
    with pytest.raises(AdapterConflict, match="first"):
        catalog.add(catalog.read("first", "b"))
    with pytest.raises(AdapterConflict, match="first"):
        catalog.add(catalog.read("FIRST", "b"))
    with pytest.raises(AdapterConflict, match="base"):
        catalog.read("Base", "a")
    for name in ("", "a,b", "../x", "a b", "a/b", "x" * 129, "-x", "ü"):
        with pytest.raises(InvalidAdapterName):
            catalog.read(name, "a")
    with pytest.raises(AdapterNotFound):
        catalog.get("First")
    with pytest.raises(AdapterConflict):
        catalog.remove("base")
    assert [entry.ref.name for entry in catalog] == ["first"]
    assert catalog.remove("first").ref == entry.ref and "first" not in catalog


def test_paths_outside_the_roots_are_refused(tmp_path: Path) -> None:
    root, secret = tmp_path / "root", tmp_path / "secret"
    root.mkdir(), lora(secret), lora(root / "a")
    (root / "link").symlink_to(secret)
    inside = lora(root / "b")
    (inside / "adapter_model.safetensors").unlink()
    (inside / "adapter_model.safetensors").symlink_to(secret / "adapter_model.safetensors")
    catalog = Catalog("base", BASE, (root,))
    for path in ("../secret", str(secret), "link", "b", "/", "a/../../secret", "a\0"):
        with pytest.raises(AdapterPathRefused):
            catalog.read("x", path)
    assert catalog.read("x", "a").root == "a"
    assert catalog.read("x", str(root / "a")).root == "a"
    with pytest.raises(AdapterPathRefused, match="without an adapter directory"):
        Catalog("base", BASE).read("x", "a")
