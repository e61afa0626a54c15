"""The base that an adapter names, against the names of the base that is served."""

import json
from pathlib import Path
from typing import Any

import pytest

from adapters_store.declared_base import declared, difference, is_known, names_of_base, remarks
from tests.support.adapter_files import BASE, esft, lora, read_adapter

LLAMA = ("meta-llama/Llama-3-8B", "my-base")


@pytest.mark.parametrize(
    ("name", "known", "same"),
    [
        ("meta-llama/Llama-3-8B", LLAMA, True),
        ("Llama-3-8B", LLAMA, True),
        ("META-LLAMA/llama-3-8b", LLAMA, True),
        ("somebody/Llama-3-8B/", LLAMA, True),
        ("/home/me/models/Llama-3-8B", LLAMA, True),
        ("C:\\models\\Llama-3-8B", LLAMA, True),
        ("my-base", LLAMA, True),
        ("/cache/hub/models--meta-llama--Llama-3-8B/snapshots/0123abc", LLAMA, True),
        ("models--meta-llama--Llama-3-8B", LLAMA, True),
        ("models--a--mirror--Llama-3-8B/snapshots/x", LLAMA, True),
        ("Llama-3-8B//", LLAMA, True),
        ("mistralai/Mistral-7B-v0.1", LLAMA, False),
        ("meta-llama/Llama-3-8B-Instruct", LLAMA, False),
        ("Llama-3", LLAMA, False),
        ("unsloth/llama-3-8b-bnb-4bit", LLAMA, False),
        ("unsloth/llama-3-8b-bnb-4bit", (*LLAMA, "unsloth/llama-3-8b-bnb-4bit"), True),
    ],
)
def test_names_are_compared_by_their_last_step_without_case(name: str, known: tuple[str, ...], same: bool) -> None:
    assert is_known(name, known) is same
    differs = [told for told in remarks(name, known) if "The adapter says that it was trained on" in told]
    assert bool(differs) is not same
    assert all(repr(name) in told and "'meta-llama/Llama-3-8B', 'my-base'" in told for told in differs)


@pytest.mark.parametrize(
    "name",
    [
        "x/llama-bnb-4bit",
        "x/Llama-3-8B-GPTQ",
        "TheBloke/a-AWQ",
        "a-nf4",
        "a-int4",
        "a.w4a16",
        "a-FP8",
        "a-4bit",
        "a-8bit",
        "a_q4_k_m",
    ],
)
def test_quantised_bases_are_told_of_even_where_the_name_is_known(name: str) -> None:
    for known in (LLAMA, (name,)):
        assert "names quantised weights" in remarks(name, known)[-1]


@pytest.mark.parametrize("name", ["fxmeng/PiSSA-Llama-2-7B-r16", "LoftQ/Mistral-7B-v0.1-4bit-64rank", "me/olora_base",
                                  "llama-residual"])  # fmt: skip
def test_bases_that_an_initialisation_changed_are_told_of(name: str) -> None:
    assert "belongs to those weights only" in remarks(name, (name,))[-1]


@pytest.mark.parametrize("name", ["meta-llama/Llama-3-8B", "x/bits-and-bytes-of-history", "Qwen2-72B", "pissarro-7b",
                                  "awqa", "int40", "a-q4"])  # fmt: skip
def test_other_names_are_not(name: str) -> None:
    assert remarks(name, (name,)) == [] == remarks(None, LLAMA)


def test_the_base_is_known_by_its_directory_and_its_configuration(tmp_path: Path) -> None:
    plain = tmp_path / "Some-Model"
    hub = tmp_path / "models--org--Name" / "snapshots" / "0123"
    for directory, own in ((plain, "org/Original"), (hub, "/home/them/secret-place/Original")):
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps({"_name_or_path": own}))
    assert names_of_base(str(plain)) == ["Some-Model", "org/Original"]
    assert names_of_base(str(hub)) == ["org/Name", "Original"]  # and no place on a machine
    (hub / "config.json").write_text(json.dumps({"_name_or_path": "/home/them/OriginalX//"}))
    assert names_of_base(str(hub)) == ["org/Name", "OriginalX"]
    (hub / "config.json").unlink()
    assert names_of_base(str(hub)) == ["org/Name"]
    (tmp_path / "link").symlink_to(plain)
    assert names_of_base(str(tmp_path / "link"))[0] == "Some-Model"
    for text in ("{", "[]", '{"_name_or_path": 3}'):
        (plain / "config.json").write_text(text)
        assert names_of_base(str(plain)) == ["Some-Model"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [("org/Name", "org/Name"), ("  x ", "x"), ("", None), (None, None), (5, None), (["x"], None),
     ("a\x1b[2J\nb", "a\\x1b[2J\\nb")],
)  # fmt: skip
def test_what_an_adapter_declares_is_cleaned(tmp_path: Path, value: Any, shown: str | None) -> None:
    assert declared(value) == shown
    directory = lora(tmp_path / "a", base_model_name_or_path=value)
    assert read_adapter(directory, BASE).declared_base == shown
    copied = esft(tmp_path / "b", {1: [0]})
    assert read_adapter(copied, BASE).declared_base is None
    (copied / "config.json").write_text(json.dumps({"_name_or_path": value}))
    assert read_adapter(copied, BASE).declared_base == shown
    (copied / "config.json").write_text("{")  # somebody else's file: no reason to refuse the adapter
    assert read_adapter(copied, BASE).declared_base is None


def test_a_long_name_is_cut() -> None:
    assert len(str(declared("x" * 10_000)).encode()) <= 200


def test_the_names_of_the_base_are_told_once_each_and_in_part() -> None:
    told = difference("x", ("base", "org/base", "base", "y" * 1000))
    names = f"'base', 'org/base', '{'y' * 197}…'"
    assert told == f"The adapter says that it was trained on 'x'; this server's base is known as {names}."


def test_what_is_odd_is_told_in_whole_sentences() -> None:
    first, second, third = remarks("a/PiSSA-nf4", ("b",))
    assert first.endswith("is known as 'b'. The shapes fit, which other models' may too.")
    assert second == (
        "'a/PiSSA-nf4' names quantised weights: the adapter was trained against those and is served on this base's own."
    )
    assert third == (
        "'a/PiSSA-nf4' names a base whose weights the initialisation changed (PiSSA, LoftQ, OLoRA, …): the adapter "
        "belongs to those weights only. Convert it with PEFT's path_initial_model_for_weight_conversion."
    )
