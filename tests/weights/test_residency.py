"""The paged weight manager: pages under arenas, true sizes in memory, eviction and pins."""

import faulthandler
import math
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapters_store.catalog import CatalogEntry
from adapters_store.files import read_exactly
from adapters_store.parts import ExpertReplacement, LowRank, SourceFile, TensorRef
from kernels.lora import Field, LoraSite, SiteAdapters
from server.engine.request import FinishReason
from server.engine.residency import AdapterFailed, Wait
from server.model.probe import PROBE
from server.weights import transfer
from server.weights.arena import ArenaError, PageWork, VirtualArena
from server.weights.host_arena import HostPages, host_arenas
from server.weights.lora_slabs import LoraSlabs
from server.weights.page_pool import PagePool
from server.weights.residency import DeviceResidency
from server.weights.staging import HostCopy
from server.weights.transfer import Job, Transfer
from tests.model.test_families import reference
from tests.support.engine_harness import Engine, prompts
from tests.support.tiny_adapters import merge, register, save_esft, save_lora
from tests.support.tiny_models import make_model

PAGE = HostPages.page_bytes


@pytest.fixture
def arena() -> Iterator[VirtualArena]:
    arena = VirtualArena(1 << 40, HostPages())  # a TiB of addresses
    yield arena
    arena.close()


def resident_bytes() -> int:
    """This process's anonymous memory, as the kernel counts it."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def touches_unmapped(arena: VirtualArena, offset: int) -> bool:
    """Whether reading there kills a child process: the wanted, loud failure."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()  # the fault is wanted; its report is not
        arena.tensor(offset, (1,), torch.uint8).item()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_a_reservation_costs_no_memory_and_a_map_costs_its_pages(arena: VirtualArena) -> None:
    before = resident_bytes()
    assert arena.map(7 * PAGE, 1000 * PAGE) == 1000
    assert resident_bytes() - before < 20 * PAGE  # mapped, not yet written
    arena.tensor(7 * PAGE, (1000 * PAGE,), torch.uint8).fill_(1)
    assert abs(resident_bytes() - before - 1000 * PAGE) < 20 * PAGE
    assert arena.unmap(7 * PAGE, 1000 * PAGE) == 1000
    assert resident_bytes() - before < 20 * PAGE


def test_neighbours_share_their_edge_page(arena: VirtualArena) -> None:
    half = PAGE + PAGE // 2
    assert arena.pages_to_map(0, half) == 2
    assert arena.map(0, half) == 2
    assert arena.map(half, half) == 1  # the page in the middle is there already
    arena.tensor(half, (4,), torch.uint8).fill_(9)
    assert arena.unmap(0, half) == 1
    assert arena.tensor(half, (4,), torch.uint8).tolist() == [9] * 4  # its neighbour's going changed nothing
    assert touches_unmapped(arena, 0) and not touches_unmapped(arena, half)
    arena.check([(half, half)])
    assert arena.unmap(half, half) == 2
    arena.map(half, half)
    assert arena.tensor(half, (4,), torch.uint8).tolist() == [0] * 4  # memory comes back clean


def test_random_ranges_keep_their_pages_and_contents(arena: VirtualArena) -> None:
    rng = random.Random(3)
    live: dict[int, tuple[int, int]] = {}
    for step in range(400):
        if live and rng.random() < 0.45:
            slot = rng.choice(list(live))
            offset, size = live.pop(slot)
            assert (arena.tensor(offset, (size,), torch.uint8) == slot % 251).all()
            arena.unmap(offset, size)
        else:
            slot = rng.choice([slot for slot in range(64) if slot not in live])
            offset, size = slot * 3 * PAGE // 2, rng.randrange(1, 3 * PAGE // 2)
            arena.map(offset, size)
            arena.tensor(offset, (size,), torch.uint8).fill_(slot % 251)
            live[slot] = offset, size
        if step % 20 == 0:
            arena.check(list(live.values()))
    assert arena.num_mapped_pages > 0


def test_more_addresses_than_there_are_is_a_clear_error() -> None:
    with pytest.raises(ArenaError, match="cannot reserve 1024.00 TiB"):
        VirtualArena(1 << 50, HostPages())


def wait_until_resident(residency: DeviceResidency, entry: CatalogEntry) -> int:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        residency.poll()
        slot = residency.acquire(entry.ref)
        if not isinstance(slot, Wait):
            return slot
        time.sleep(0.001)
    raise AssertionError("the adapter did not become resident")


def test_an_esft_adapter_occupies_its_tuned_experts_and_less_than_a_page_a_tensor(tmp_path: Path) -> None:
    """By the kernel's count of resident memory, on experts of about 100 kB that are no multiple of a page."""
    shape = {"hidden_size": 136, "moe_intermediate_size": 66, "num_experts": 16, "num_hidden_layers": 3}
    engine = Engine(make_model("qwen3_moe", attention=PROBE, **shape))
    tuned = {0: [1, 5, 9, 12, 15], 1: [0, 3, 7, 8], 2: [2, 4, 6, 10, 11, 13, 14]}
    warm_up = register(engine, save_esft(tmp_path / "warm", make_model("qwen3_moe", **shape), 8, {0: [0]}))
    entry = register(engine, save_esft(tmp_path / "esft", make_model("qwen3_moe", **shape), 3, tuned))
    residency = engine.residency
    wait_until_resident(residency, warm_up)
    before = resident_bytes()
    wait_until_resident(residency, entry)
    grown = resident_bytes() - before
    replaced = [part for part in entry.package.parts if isinstance(part, ExpertReplacement)]
    experts = sum(3 * 136 * 66 * 4 for _ in replaced)
    stacks = 2 * len(tuned)  # gate_up and down of each layer: one contiguous range of the adapter in each
    assert experts <= grown < experts + 3 * len(replaced) * PAGE
    on_device = next(it for it in residency.report() if it.ref == entry.ref)
    assert 0 <= on_device.bytes - experts < stacks * PAGE  # only the last page of each range is not full
    residency.release(entry.ref)
    engine.remove(entry.ref)
    deadline = time.monotonic() + 10
    while resident_bytes() - before >= 32 * PAGE and time.monotonic() < deadline:  # on the transfer thread
        time.sleep(0.001)
    assert resident_bytes() - before < 32 * PAGE  # and gives all of it back
    residency.check()


def test_a_lora_adapter_occupies_its_true_rank(tmp_path: Path) -> None:
    engine = Engine(make_model("llama", attention=PROBE))
    sizes = {}
    for rank in (1, 64):
        entry = register(engine, save_lora(tmp_path / f"r{rank}", make_model("llama"), rank, ("q_proj",), rank=rank))
        wait_until_resident(engine.residency, entry)
        sizes[rank] = next(it.bytes for it in engine.residency.report() if it.ref == entry.ref)
        assert sizes[rank] - entry.package.num_elements * 4 < PAGE
    assert sizes == {1: PAGE, 64: 32 * PAGE}  # 2 kB rounded up, 128 kB exactly


def test_the_least_recently_used_adapter_makes_room_and_pinned_ones_never_do(tmp_path: Path) -> None:
    engine = Engine(make_model("llama", attention=PROBE), adapter_slots=2)
    residency = engine.residency
    model = make_model("llama")
    first, second, third = (register(engine, save_lora(tmp_path / str(i), model, i, ("q_proj",))) for i in range(3))
    wait_until_resident(residency, first)
    residency.release(first.ref)
    wait_until_resident(residency, second)
    assert wait_until_resident(residency, third) == 1  # the first one's slot
    assert residency.acquire(first.ref) is Wait.NO_ROOM  # both others are pinned
    residency.release(second.ref)
    residency.check()
    assert wait_until_resident(residency, first) == 2
    residency.check()


def test_an_adapter_that_can_never_fit_fails_with_the_numbers(tmp_path: Path) -> None:
    engine = Engine(make_model("llama", attention=PROBE), adapter_bytes=16 * PAGE)
    entry = register(engine, save_lora(tmp_path / "big", make_model("llama"), 1, ("q_proj",), rank=64))
    with pytest.raises(AdapterFailed, match=f"may use {16 * PAGE:,}"):
        engine.residency.acquire(entry.ref)


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
    assert not engine.residency.shape_key(1).experts and engine.residency._stacks.num_mapped_pages == 0
    engine.residency.check()


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


def test_registering_again_says_where_the_files_are_now(tmp_path: Path) -> None:
    engine = Engine(make_model("llama", attention=PROBE))
    entry = register(engine, save_lora(tmp_path / "here", make_model("llama"), 1, ("q_proj",)), "name")
    (tmp_path / "here").rename(tmp_path / "there")
    request = engine.add(prompts()[1], 5, entry.ref)
    engine.run()
    assert request.finish is FinishReason.ERROR
    assert str(tmp_path) not in str(request.error)  # the client learns no path
    again = register(engine, tmp_path / "there", "name")
    assert again.ref == entry.ref
    request = engine.add(prompts()[1], 5, entry.ref)
    engine.run()
    assert request.tokens == reference(merge(make_model("llama"), again), prompts()[1], 5)


def test_registering_again_forgives_a_failure_that_nobody_heard_of(tmp_path: Path) -> None:
    engine = Engine(make_model("llama", attention=PROBE))
    entry = register(engine, save_lora(tmp_path / "here", make_model("llama"), 1, ("q_proj",)), "name")
    (tmp_path / "here").rename(tmp_path / "there")
    assert engine.residency.acquire(entry.ref) is Wait.LOADING
    deadline = time.monotonic() + 10
    while engine.residency.is_loading() and time.monotonic() < deadline:
        engine.residency.poll()
    again = register(engine, tmp_path / "there", "name")
    wait_until_resident(engine.residency, again)  # raises if the old failure is still told


def test_more_experts_than_a_slot_has_room_for_are_refused(tmp_path: Path) -> None:
    engine = Engine(make_model("qwen3_moe", attention=PROBE), max_experts_per_adapter=2)
    entry = register(engine, save_esft(tmp_path / "esft", make_model("qwen3_moe"), 1, {1: [0, 2, 5]}))
    with pytest.raises(AdapterFailed, match="tunes 3 experts of layer 1; there is room for 2"):
        engine.residency.acquire(entry.ref)


class SteppedTransfers:
    """Transfers and page work that are done when a test says so, well or badly, in order."""

    def __init__(self) -> None:
        self.pending: list[Job] = []

    def start(self, job: Job) -> None:
        self.pending.append(job)

    def run_next(self, fails: bool) -> None:
        job = self.pending.pop(0)
        if fails and isinstance(job, Transfer):
            job._files = [SourceFile("gone", "/gone", 0, "")]
        job.run()


def test_residency_under_random_events_keeps_its_books(tmp_path: Path) -> None:
    """The real residency, slabs, stacks and arenas; adapters of both kinds; transfers that fail; too little room."""
    model = make_model("qwen3_moe")
    engine = Engine(make_model("qwen3_moe", attention=PROBE), adapter_slots=3, adapter_bytes=60 * PAGE)
    residency, transfers, rng = engine.residency, SteppedTransfers(), random.Random(5)
    residency._transfers = transfers  # type: ignore[assignment]
    paths = [save_lora(tmp_path / f"l{i}", model, i, ("q_proj", "v_proj"), rank=2 + 9 * i) for i in range(3)]
    paths += [save_esft(tmp_path / f"e{i}", model, i, {1: [i, 5], 3: [0, 2, 7][: i + 1]}) for i in range(3)]
    entries = [register(engine, path) for path in paths]
    known = {entry.ref: 0 for entry in entries}  # pins
    seen: set[str] = set()
    for _ in range(3000):
        entry = rng.choice(entries)
        match rng.randrange(6):
            case 0 | 1 if entry.ref in known:
                try:
                    slot = residency.acquire(entry.ref)
                except AdapterFailed:
                    seen.add("failed")
                else:
                    seen.add(str(slot))
                    known[entry.ref] += not isinstance(slot, Wait)
            case 2 if known.get(entry.ref):
                residency.release(entry.ref)
                known[entry.ref] -= 1
            case 3 if transfers.pending:
                transfers.run_next(fails=rng.random() < 0.2)
            case 4 if known.get(entry.ref) == 0:
                residency.forget(entry.ref)
                del known[entry.ref]
            case 5 if entry.ref not in known:
                residency.register(entry.ref, entry.package)
                known[entry.ref] = 0
        residency.poll()
        residency.check()
    assert {"failed", "Wait.LOADING", "Wait.NO_ROOM", "1", "2", "3"} <= seen
    while transfers.pending:
        transfers.run_next(fails=False)
        residency.poll()
    for ref, pins in known.items():
        for _ in range(pins):
            residency.release(ref)
        residency.forget(ref)
    residency.poll()
    residency.check()
    while transfers.pending:
        transfers.run_next(fails=False)
    assert residency.report() == () and residency._pool.num_used == 0
    assert residency._slabs._arena.num_backed_pages == 0  # type: ignore[attr-defined]


def test_the_same_name_with_other_weights_never_reuses_a_prefix(tmp_path: Path) -> None:
    engine = Engine(make_model("llama", attention=PROBE))
    answers = []
    for seed in (1, 2):
        entry = register(
            engine, save_lora(tmp_path / f"v{seed}", make_model("llama"), seed, ("q_proj", "v_proj")), "name"
        )
        request = engine.add(prompts()[1], 8, entry.ref)
        engine.run()
        assert request.tokens == reference(merge(make_model("llama"), entry), prompts()[1], 8)
        assert request.num_cached_tokens == 0
        answers.append(request.tokens)
        engine.remove(entry.ref)
    assert answers[0] != answers[1]


def test_the_table_that_kernels_read_says_where_any_adapter_acts() -> None:
    arenas = host_arenas()
    slabs = LoraSlabs(2, PagePool(1 << 20, arenas.page_bytes), torch.float32, arenas)
    held = {"q": SiteAdapters(), "o": SiteAdapters()}
    for name, width in (("q", 8), ("o", 6)):
        slabs.bind(name, [(LoraSite((width,)), held[name], lambda weights: [(0, weights)])])
    slabs.make_table(torch.device("cpu"))
    parts = {
        slot: [LowRank("q", TensorRef("f", "a", (rank, 4), "F32"), TensorRef("f", "b", (8, rank), "F32"), 1.0)]
        for slot, rank in ((1, 3), (2, 5))
    }
    for slot in (1, 2):
        slabs.map(slot, parts[slot])
        slabs.install(slot, parts[slot])
    assert (slabs.rank(1), slabs.rank(2)) == (3, 5)
    for slot in (1, 2):
        assert held["q"].table is not None and held["o"].table is not None
        assert held["q"].table[0, 0, Field.A] == 1 and held["q"].table[slot].any() and not held["o"].table.any()
        slabs.unmap(slot)
    assert not held["q"].table.any() and slabs.rank(1) == slabs.rank(2) == 0
