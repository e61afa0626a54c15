"""Names and what they mean: who may have one, what replacing does, and what still resolves."""

import random
from collections.abc import Callable

import msgspec
import pytest

from adapters_store.catalog import KEPT_VERSIONS, Catalog, Change
from adapters_store.errors import (
    AdapterConflict,
    AdapterError,
    AdapterNotFound,
    CatalogFull,
    InvalidAdapterName,
    InvalidAlias,
)
from adapters_store.manifest import PLAIN, Manifest
from adapters_store.records import Target, Version, Weights

DESCRIBED = Manifest(description="another")


def revision(seed: str) -> str:
    """Distinct from its first digits on."""
    return f"{ord(seed[0]):04x}{ord(seed[-1]):04x}{len(seed):056x}"


def weights(seed: str) -> Weights:
    return Weights(revision(seed), "lora", 10)


def version(seed: str, since: int = 5, manifest: Manifest = PLAIN) -> Version:
    return Version(revision(seed), seed, since, manifest)


class Names(Catalog):
    """A catalogue whose changes are applied as soon as they are planned."""

    def __init__(self, **settings: int) -> None:
        super().__init__("Base", **settings)
        self.gone: list[str] = []

    def do(self, change: Change | None) -> Change | None:
        if change is not None:
            self.gone += self.apply(change)
        self.check()
        return change

    def add(self, name: str, seed: str = "a", manifest: Manifest = PLAIN, is_durable: bool = True) -> Change | None:
        return self.do(self.registered(name, weights(seed), version(seed, manifest=manifest), is_durable))

    def put(self, name: str, seed: str, manifest: Manifest = PLAIN) -> Change | None:
        return self.do(self.replaced(name, weights(seed), version(seed, manifest=manifest)))

    def means(self, model: str) -> str:
        return self.find(model).version.root


@pytest.fixture
def names() -> Names:
    return Names()


# -- names ---


@pytest.mark.parametrize("name", ["a", "0", "A.b_c-D", "x" * 128, "base-2", "a.."])
def test_letters_digits_dots_dashes_and_underscores_make_a_name(names: Names, name: str) -> None:
    assert names.add(name) is not None and name in names


@pytest.mark.parametrize(
    "name", ["", "a,b", "../x", "a b", "a/b", "x" * 129, "-x", ".x", "_x", "ü", "a\n", "a\0", "\udcff", "a@b"]
)
def test_what_would_not_be_whole_in_a_url_or_a_label_is_no_name(names: Names, name: str) -> None:
    target = (Target("Base"),)
    for plan in (lambda: names.add(name), lambda: names.put(name, "a"), lambda: names.aliased(name, target, 1)):
        with pytest.raises(InvalidAdapterName, match="is not an adapter name: 1 to 128 of") as refusal:
            plan()
        assert str(refusal.value).isprintable()
    assert list(names) == []


@pytest.mark.parametrize("name", ["Base", "base", "BASE"])
def test_the_bases_name_is_nobody_elses(names: Names, name: str) -> None:
    for plan in (lambda: names.add(name), lambda: names.aliased(name, (Target("Base"),), 1)):
        with pytest.raises(AdapterConflict, match=f"{name!r} is the name of the base model"):
            plan()


@pytest.mark.parametrize("name", ["Name", "NAME", "nam", "name ", "", "name@", "name@zz", "name@00"])
def test_a_name_is_found_as_it_was_given_and_not_otherwise(names: Names, name: str) -> None:
    names.add("name")
    with pytest.raises(AdapterNotFound, match=f"no adapter is named {name!r}"):
        names.find(name)


def test_adapters_come_in_the_order_of_their_names_a_page_at_a_time(names: Names) -> None:
    for name in ("b", "a", "C", "10", "9"):
        names.add(name, name)
    assert [it.name for it in names] == ["10", "9", "a", "b", "C"]
    assert [it.name for it in names.page(None, 2)] == ["10", "9"]
    assert [it.name for it in names.page("9", 2)] == ["a", "b"] == [it.name for it in names.page("95", 2)]
    assert names.page("C", 2) == []


# -- registering ---


@pytest.mark.parametrize(
    ("name", "seed", "says"),
    [
        ("name", "b", "the name 'name' is taken by other weights; replace them with PUT, or delete that adapter first"),
        ("NAME", "b", "the name 'NAME' is taken by 'name'; delete that adapter first"),
        ("NAME", "a", "the name 'NAME' is taken by 'name'; delete that adapter first"),
    ],
)
def test_a_name_is_not_given_twice_whatever_its_case(names: Names, name: str, seed: str, says: str) -> None:
    names.add("name", "a")
    with pytest.raises(AdapterConflict) as conflict:
        names.add(name, seed)
    assert str(conflict.value) == says and names.means("name") == "a"


def test_the_same_again_is_no_change_and_another_manifest_is_a_conflict(names: Names) -> None:
    names.add("name", "a")
    assert names.add("name", "a") is None
    with pytest.raises(AdapterConflict, match="another manifest; replace it with PUT"):
        names.add("name", "a", DESCRIBED)


def test_what_was_not_to_outlive_the_server_does_once_somebody_registers_it(names: Names) -> None:
    names.add("name", "a", is_durable=False)
    assert names.add("name", "a", is_durable=False) is None and not names.get("name").is_durable
    assert names.add("name", "a") is not None and names.get("name").is_durable


def test_there_is_a_limit_which_replacing_does_not_meet() -> None:
    names = Names(max_adapters=2)
    names.add("a", "a")
    names.add("b", "b")
    with pytest.raises(CatalogFull, match="2 adapters are registered, as many as this server takes"):
        names.add("c", "c")
    names.put("a", "c")
    names.do(names.removed("b"))
    names.add("c", "c")


# -- replacing ---


def test_a_name_means_the_new_and_the_old_still_resolves(names: Names) -> None:
    names.put("name", "a")
    names.put("name", "b")
    names.put("name", "c")
    assert names.means("name") == "c" and names.gone == []
    for seed in "abc":
        assert names.means(f"name@{revision(seed)}") == seed == names.means(f"name@{revision(seed)[:8]}")
    with pytest.raises(AdapterNotFound):  # all three begin so
        names.find(f"name@{revision('a')[:3]}")


def test_the_same_weights_with_another_manifest_are_no_new_version(names: Names) -> None:
    names.put("name", "a")
    assert names.put("name", "a") is None
    assert names.put("name", "a", DESCRIBED) is not None
    assert names.find("name").version.manifest == DESCRIBED and len(names.get("name").versions) == 1


def test_going_back_and_forth(names: Names) -> None:
    for seed in "abc":
        names.put("name", seed)
    names.do(names.rolled_back("name", None, 9))
    assert names.means("name") == "b" and names.find("name").version.since == 9
    names.do(names.rolled_back("name", None, 10))
    assert names.means("name") == "c"  # it was the one before
    names.do(names.rolled_back("name", revision("a")[:8], 11))
    assert names.means("name") == "a" and len(names.get("name").versions) == 3
    for prefix in ("ffff", revision("a"), "zz"):
        with pytest.raises(AdapterConflict, match="0 replaced revisions of 'name' begin with"):
            names.rolled_back("name", prefix, 12)


def test_what_has_expired_is_found_by_its_time(names: Names) -> None:
    for name, at in (("c", 7), ("a", 5), ("b", 5), ("d", None)):
        names.put(name, name, Manifest(expires_at=at))
    assert (names.expired(4.9), names.expired(5), names.expired(7.1)) == ([], ["a", "b"], ["a", "b", "c"])
    names.do(names.removed("a"))
    names.put("c", "e", Manifest(pinned=True))
    assert names.expired(9) == ["b"] and [it.name for it in names.pinned] == ["c"]
    names.check()


def test_there_is_no_way_back_to_what_has_expired(names: Names) -> None:
    """It would be deleted at once, and the name with all that it meant."""
    names.put("name", "a", Manifest(expires_at=5))
    names.put("name", "b")
    for prefix in (None, revision("a")[:8]):
        with pytest.raises(AdapterConflict, match="expired at 5"):
            names.rolled_back("name", prefix, 5)
    assert names.means("name") == "b"
    names.do(names.rolled_back("name", None, 4))
    assert names.means("name") == "a"


def test_a_name_that_was_never_replaced_cannot_go_back(names: Names) -> None:
    names.put("name", "a")
    with pytest.raises(AdapterConflict, match="'name' has no other revision to go back to"):
        names.rolled_back("name", None, 9)


def test_collecting_keeps_the_last_few_and_what_an_alias_names(names: Names) -> None:
    seeds = "abcdefgh"
    for seed in seeds:
        names.put("name", seed)
    names.do(names.aliased("alias", (Target(f"name@{revision('a')[:8]}"),), 1))
    change = names.do(names.trimmed(names.get("name")))
    kept = [it.root for it in names.get("name").versions]
    assert kept == ["h", *seeds[-2 : -2 - KEPT_VERSIONS : -1], "a"] and names.gone == [revision("b")]
    assert change is not None and revision("b")[:12] in (change.details or "")
    assert names.trimmed(names.get("name")) is None


# -- removing ---


def test_what_is_removed_is_gone_with_its_versions_unless_another_name_means_them(names: Names) -> None:
    names.put("name", "a")
    names.put("name", "b")
    names.add("other", "a")
    names.do(names.removed("name"))
    assert "name" not in names and names.gone == [revision("b")] and names.is_used(revision("a"))
    names.do(names.removed("other"))
    assert names.gone == [revision("b"), revision("a")]
    assert names.add("NAME", "c") is not None


def test_the_base_cannot_be_deleted(names: Names) -> None:
    with pytest.raises(AdapterConflict, match="'Base' is the base model and cannot be deleted"):
        names.removed("Base")
    with pytest.raises(AdapterNotFound):
        names.removed("base")


# -- aliases ---


def test_an_alias_stands_for_adapters_their_revisions_and_the_base(names: Names) -> None:
    names.put("a", "a")
    targets = (Target("a", 0.9), Target(f"a@{revision('a')[:6]}", 0.1), Target("Base", 0))
    names.do(names.aliased("alias", targets, 7))
    alias = names.alias("alias")
    assert alias is not None and alias.targets == targets and alias.created == 7
    names.do(names.aliased("alias", targets[:1], 9))
    alias = names.alias("alias")
    assert alias is not None and alias.created == 7 and names.alias("Alias") is None


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        ((), "0 targets"),
        ((Target("a"),) * 33, "33 targets"),
        ((Target("a"), Target("a")), "named twice"),
        ((Target("a", 0),), "all weights are 0"),
        ((Target("a", -1),), "weight of 'a' is -1"),
        ((Target("a", float("nan")),), "weight of 'a' is nan"),
        ((Target("a", float("inf")),), "weight of 'a' is inf"),
        ((Target("other"),), "is an alias itself"),
    ],
)
def test_an_alias_that_could_serve_nothing_is_refused(names: Names, targets: tuple[Target, ...], says: str) -> None:
    names.add("a")
    names.do(names.aliased("other", (Target("a"),), 1))
    with pytest.raises(InvalidAlias, match=says):
        names.aliased("alias", targets, 1)


def test_an_alias_of_nothing_is_not_found(names: Names) -> None:
    with pytest.raises(AdapterNotFound):
        names.aliased("alias", (Target("missing"),), 1)
    with pytest.raises(AdapterNotFound):
        names.unaliased("missing")


def test_adapters_and_aliases_share_one_set_of_names(names: Names) -> None:
    names.add("a")
    names.do(names.aliased("alias", (Target("a"),), 1))
    for plan in (lambda: names.add("ALIAS", "b"), lambda: names.put("alias", "b")):
        with pytest.raises(AdapterConflict, match="is the name of an alias"):
            plan()
    with pytest.raises(AdapterConflict, match="is the name of an adapter"):
        names.aliased("A", (Target("Base"),), 1)
    with pytest.raises(AdapterConflict, match="the alias 'alias' stands for 'a'"):
        names.removed("a")
    names.do(names.unaliased("alias"))
    names.do(names.removed("a"))


# -- all of it, at random ---


def test_whatever_happens_in_whatever_order_the_books_are_right() -> None:
    """Against a model that keeps nothing but each name's list of versions."""
    rng = random.Random(5)
    names, model = Names(max_adapters=6), dict[str, list[str]]()
    acts: list[Callable[[str, str], Change | None]] = [
        lambda name, seed: names.add(name, seed, is_durable=rng.random() < 0.7),
        lambda name, seed: names.put(name, seed, rng.choice([PLAIN, DESCRIBED, Manifest(pinned=True)])),
        lambda name, seed: names.do(names.rolled_back(name, rng.choice([None, revision(seed)]), 1)),
        lambda name, _: names.do(names.removed(name)),
        lambda name, _: names.do(names.trimmed(names.get(name), keep=1)),
        lambda name, seed: names.do(names.aliased(f"alias-{seed}", (Target(name), Target("Base")), 1)),
        lambda _, seed: names.do(names.unaliased(f"alias-{seed}")),
    ]
    refused = 0
    for _ in range(20_000):
        name, seed = rng.choice("nmopqrst"), rng.choice("abcdef")
        try:
            change = rng.choice(acts)(name, seed)
        except AdapterError:
            refused += 1
            continue
        if change is None or change.name != name:
            continue
        known = model.setdefault(name, [])
        if change.record is None:
            del model[name]
        elif change.action == "collect":
            assert [it.root for it in change.record.versions] == known[:2]
            model[name] = known[:2]
        else:
            new = change.record.current.root
            model[name] = [new, *(it for it in known if it != new)]
    assert refused > 1000 and {it.name for it in names} == set(model)
    for name, versions in model.items():
        assert [it.root for it in names.get(name).versions] == versions
        for seed in versions:
            assert names.means(f"{name}@{revision(seed)}") == seed


def test_a_change_survives_being_written_down() -> None:
    names = Names()
    change = names.add("name", "a", DESCRIBED)
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(change), type=Change)
    assert again == change
