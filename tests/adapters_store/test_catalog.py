"""Names and what they mean: who may have one, what giving it again does, and below which directories paths may lie."""

import time
from pathlib import Path

import pytest

from adapters_store.catalog import Catalog, CatalogEntry, entry_of
from adapters_store.errors import (
    AdapterConflict,
    AdapterNotFound,
    AdapterPathRefused,
    InvalidAdapter,
    InvalidAdapterName,
)
from adapters_store.parts import AdapterPackage
from adapters_store.ref import AdapterRef, Kind
from adapters_store.room import Room
from adapters_store.verify import Verified
from tests.support.adapter_files import BASE, lora


def entry(name: str, weights: str = "a", root: str = "a", created: int = 5, kind: Kind = "lora") -> CatalogEntry:
    package = AdapterPackage(kind, f"/adapters/{root}", weights, (), ())
    return CatalogEntry(AdapterRef(name, weights, kind), package, root, created)


@pytest.fixture
def catalog() -> Catalog:
    return Catalog("Base", BASE, base_names=("org/Base", "other"))


# -- names ---


@pytest.mark.parametrize("name", ["a", "0", "A.b_c-D", "x" * 128, "base-2", "a.."])
def test_letters_digits_dots_dashes_and_underscores_make_a_name(catalog: Catalog, name: str) -> None:
    assert catalog.job(name, "a").path == "a"
    assert catalog.add(entry(name)) is True and name in catalog


@pytest.mark.parametrize(
    "name", ["", "a,b", "../x", "a b", "a/b", "x" * 129, "-x", ".x", "_x", "ü", "a\n", "a\0", "\udcff"]
)
def test_what_would_not_be_whole_in_a_url_or_a_label_is_no_name(catalog: Catalog, name: str) -> None:
    for give in (lambda: catalog.job(name, "a"), lambda: catalog.add(entry(name))):
        with pytest.raises(InvalidAdapterName, match="is not an adapter name: 1 to 128 of") as refusal:
            give()
        assert str(refusal.value).isprintable()
    assert list(catalog) == []


@pytest.mark.parametrize("name", ["Base", "base", "BASE"])
def test_the_bases_name_is_no_adapters(catalog: Catalog, name: str) -> None:
    for give in (lambda: catalog.job(name, "a"), lambda: catalog.add(entry(name))):
        with pytest.raises(AdapterConflict, match=f"{name!r} is the name of the base model"):
            give()
    assert name not in catalog and catalog.base_name == "Base"


def test_the_base_may_be_known_by_other_names_which_adapters_may_have(catalog: Catalog) -> None:
    assert catalog.base_names == ("Base", "org/Base", "other")
    assert catalog.add(entry("other")) is True


# -- giving a name ---


def test_a_name_means_what_it_was_given_to(catalog: Catalog) -> None:
    first, second = entry("first", "a"), entry("second", "b")
    assert catalog.add(first) is True and catalog.add(second) is True
    assert catalog.get("first") is first and catalog.get("second") is second


def test_one_adapter_may_have_two_names(catalog: Catalog) -> None:
    assert catalog.add(entry("first", "a")) is True and catalog.add(entry("second", "a")) is True


def test_giving_a_name_again_to_the_same_weights_says_where_they_are_now(catalog: Catalog) -> None:
    catalog.add(entry("name", "a", root="here", created=5))
    assert catalog.add(entry("name", "a", root="there", created=9)) is False
    again = catalog.get("name")
    assert (again.root, again.package.path, again.created) == ("there", "/adapters/there", 5)
    assert len(list(catalog)) == 1


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (entry("name", "b"), "the name 'name' is taken by 'name' with other weights; delete that adapter first"),
        (entry("NAME", "b"), "the name 'NAME' is taken by 'name' with other weights; delete that adapter first"),
        (entry("NAME", "a"), "the name 'NAME' is taken by 'name'; delete that adapter first"),
        (entry("name", "a", kind="esft"), "the name 'name' is taken by 'name'; delete that adapter first"),
    ],
    ids=["other weights", "other weights in capitals", "the same in capitals", "another kind"],
)
def test_a_name_is_not_given_twice_whatever_its_case(catalog: Catalog, other: CatalogEntry, says: str) -> None:
    first = entry("name", "a")
    catalog.add(first)
    with pytest.raises(AdapterConflict) as conflict:
        catalog.add(other)
    assert str(conflict.value) == says
    assert list(catalog) == [first]


# -- finding and removing ---


@pytest.mark.parametrize("name", ["Name", "NAME", "nam", "name ", ""])
def test_a_name_is_found_as_it_was_given_and_not_otherwise(catalog: Catalog, name: str) -> None:
    catalog.add(entry("name"))
    assert "name" in catalog and name not in catalog
    with pytest.raises(AdapterNotFound, match=f"no adapter is named {name!r}"):
        catalog.get(name)
    with pytest.raises(AdapterNotFound):
        catalog.remove(name)
    assert "name" in catalog


def test_what_is_removed_is_returned_and_its_name_is_free(catalog: Catalog) -> None:
    first = entry("Name", "a")
    catalog.add(first)
    catalog.add(entry("other", "b"))
    assert catalog.remove("Name") is first
    assert "Name" not in catalog and [it.ref.name for it in catalog] == ["other"]
    assert catalog.add(entry("NAME", "c")) is True


def test_the_base_cannot_be_deleted(catalog: Catalog) -> None:
    with pytest.raises(AdapterConflict, match="'Base' is the base model and cannot be deleted"):
        catalog.remove("Base")
    with pytest.raises(AdapterNotFound):
        catalog.remove("base")


def test_adapters_come_in_the_order_of_their_names(catalog: Catalog) -> None:
    assert list(catalog) == []
    for name in ("b", "a", "C", "10", "9"):
        catalog.add(entry(name, name))
    assert [it.ref.name for it in catalog] == ["10", "9", "C", "a", "b"]


# -- what is verified for a name ---


def test_a_job_carries_what_verification_needs(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    room = Room(1, 2, 3)
    job = Catalog("base", BASE, (tmp_path / "link", tmp_path), room).job("x", "a/b")
    real = str(tmp_path.resolve())
    assert (job.path, job.roots, job.base, job.room) == ("a/b", (f"{real}/real", real), BASE, room)


def test_an_entry_says_what_was_verified_and_when() -> None:
    package = AdapterPackage("esft", "/adapters/a", "revision", (), ())
    before = int(time.time())
    made = entry_of("name", Verified(package, "a"))
    assert made.ref == AdapterRef("name", "revision", "esft") and made.package is package and made.root == "a"
    assert before <= made.created <= time.time() and isinstance(made.created, int)


def test_reading_adds_nothing(tmp_path: Path) -> None:
    catalog = Catalog("base", BASE, (tmp_path,))
    lora(tmp_path / "a")
    read = catalog.read("name", "a")
    assert read.ref.name == "name" and read.ref.kind == "lora" and "name" not in catalog
    assert catalog.add(read) is True
    assert catalog.add(catalog.read("name", "a")) is False


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
    second = Catalog("base", BASE, (tmp_path / "root" / "b", root))
    assert second.read("x", str(root / "a")).root == "a"  # in any of the roots
    with pytest.raises(InvalidAdapter, match="is not a directory"):
        second.read("x", "a")  # but a relative path begins in the first
    with pytest.raises(AdapterPathRefused, match="without an adapter directory"):
        Catalog("base", BASE).read("x", "a")
