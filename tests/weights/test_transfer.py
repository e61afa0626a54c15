"""Copies from verified files: every byte once, hashed on its way, and done when the device is."""

import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapters_store.files import read_exactly
from server.engine.request import FinishReason
from server.engine.residency import AdapterFailed
from server.model.probe import PROBE
from server.weights import transfer
from server.weights.arena import ArenaError, PageWork
from server.weights.staging import HostCopy
from server.weights.transfer import Transfer
from tests.support.engine_harness import Engine, prompts
from tests.support.stepped_residency import wait_until_resident
from tests.support.tiny_adapters import merge, register, save_esft, save_lora
from tests.support.tiny_models import make_model, reference


def test_every_byte_is_read_once_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = register(
        Engine(make_model("llama", attention=PROBE)),
        save_lora(tmp_path / "a", make_model("llama"), 1, ("q_proj", "o_proj")),
    )
    reads: list[tuple[int, int]] = []

    def read(descriptor: int, offset: int, into: memoryview) -> None:
        reads.append((offset, len(into)))
        read_exactly(descriptor, offset, into)

    monkeypatch.setattr(transfer, "read_exactly", read)
    tensors = [tensor for part in reversed(entry.package.parts) for tensor in part.tensors]
    places = [(tensor, torch.full(tensor.shape, math.nan)) for tensor in tensors]
    copying = Transfer(entry.package.files, places, PageWork(), HostCopy())
    copying.run()
    assert copying.error is None
    ends = [0, *(offset + size for offset, size in reads)]
    assert [offset for offset, _ in reads] == ends[:-1] and ends[-1] == entry.package.file_bytes
    weights = load_file(entry.package.files[0].path)
    assert all(torch.equal(place, weights[tensor.key]) for tensor, place in places)


def test_a_file_that_changed_after_registration_fails_its_requests_only(tmp_path: Path) -> None:
    model = make_model("llama")
    engine = Engine(make_model("llama", attention=PROBE))
    good = register(engine, save_lora(tmp_path / "good", model, 1, ("q_proj",)))
    bad = register(engine, save_lora(tmp_path / "bad", model, 2, ("q_proj",)))
    file = tmp_path / "bad" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    victim, other = engine.add(prompts()[1], 5, bad.ref), engine.add(prompts()[1], 5, good.ref)
    engine.run()
    assert victim.finish is FinishReason.ERROR
    assert "changed after it was registered" in str(victim.error)
    assert other.tokens == reference(merge(make_model("llama"), good), prompts()[1], 5)


@pytest.mark.parametrize("where", ["header", "first", "last", "link"])
def test_other_bytes_of_the_same_size_and_time_are_never_served(tmp_path: Path, where: str) -> None:
    """Registered, served, evicted, changed in place, asked for again: hashed as it is copied, so not installed."""
    model = make_model("qwen3_moe")
    engine = Engine(make_model("qwen3_moe", attention=PROBE), adapter_slots=1)
    entry = register(engine, save_esft(tmp_path / "victim", model, 1, {1: [0, 5], 3: [2]}))
    other = register(engine, save_lora(tmp_path / "other", model, 2, ("q_proj",)))
    for it in (entry, other):  # the second evicts the first
        wait_until_resident(engine.residency, it)
        engine.residency.release(it.ref)
    file = Path(entry.package.files[0].path)
    before, raw = file.stat(), bytearray(file.read_bytes())
    first = min(tensor.offset for part in entry.package.parts for tensor in part.tensors)
    if where == "link":  # the very same bytes, but nobody has looked where they come from
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    else:
        at = {"header": 8 + raw[8:].index(b"{") + 1, "first": first, "last": len(raw) - 1}[where]
        raw[at] ^= 0x80 if where != "header" else 0x02
        file.write_bytes(raw)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    says = "Not a directory|symbolic links" if where == "link" else "changed after it was registered; register .* again"
    with pytest.raises(AdapterFailed, match=says):
        wait_until_resident(engine.residency, entry)
    assert not engine.residency.shape_key(1).experts and engine.assembly.tables.experts.num_mapped_pages == 0
    engine.residency.check()


class Waiting:
    """Copies that are complete when a test says so."""

    def __init__(self) -> None:
        self.complete, self.ended = False, False

    def put(self, *_: object) -> None:
        raise AssertionError("nothing to copy")

    def end(self) -> None:
        self.ended = True

    def is_complete(self) -> bool:
        return self.complete

    def join(self) -> None:
        pass


@pytest.mark.parametrize("fails", [False, True])
def test_a_transfer_is_done_when_the_device_is(fails: bool) -> None:
    """Also one that failed: its first copies may still be writing to the pages that will be unmapped."""
    copies, work = Waiting(), PageWork()
    if fails:
        work.add(raise_no_memory)
    transfer = Transfer([], [], work, copies)
    assert not transfer.done
    transfer.run()
    assert copies.ended and not transfer.done
    assert transfer.error == ("no memory" if fails else None)
    copies.complete = True
    assert transfer.done


def raise_no_memory() -> None:
    raise ArenaError("no memory")
