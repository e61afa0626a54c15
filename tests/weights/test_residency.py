"""Which adapters are on the device: true sizes in memory, eviction, pins, and books that agree."""

import mmap
import random
from pathlib import Path
from typing import Any

import pytest

from adapters_store.parts import AdapterPackage, ExpertReplacement
from adapters_store.ref import AdapterRef
from server.engine.messages import AdapterGone
from server.engine.request import Fault, FinishReason
from server.engine.residency import AdapterFailed, Wait
from server.model.probe import PROBE
from tests.support.engine_harness import Engine, prompts
from tests.support.process_memory import resident_bytes
from tests.support.stepped_residency import CHANGED, GONE, NO_MEMORY, SteppedLoading, wait_until_resident
from tests.support.tiny_adapters import merge, register, save_esft, save_lora
from tests.support.tiny_models import make_model, reference
from tests.support.waiting import eventually

PAGE = mmap.PAGESIZE


def test_an_esft_adapter_occupies_its_tuned_experts_and_less_than_a_page_a_tensor(tmp_path: Path) -> None:
    """By the kernel's count of resident memory, on experts of about 100 kB that are no multiple of a page."""
    shape = {"hidden_size": 136, "moe_intermediate_size": 66, "num_experts": 16, "num_hidden_layers": 3}
    engine = Engine(make_model("qwen3_moe", attention=PROBE, **shape), host_cache_bytes=0)
    tuned = {0: [1, 5, 9, 12, 15], 1: [0, 3, 7, 8], 2: [2, 4, 6, 10, 11, 13, 14]}
    warm_up = register(engine, save_esft(tmp_path / "warm", make_model("qwen3_moe", **shape), 8, tuned))
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
    eventually(lambda: resident_bytes() - before < 32 * PAGE)  # and gives all of it back, on the transfer thread
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


@pytest.mark.parametrize("state", ["absent", "resident"])
def test_registering_again_may_give_the_same_weights_in_files_of_other_names(tmp_path: Path, state: str) -> None:
    engine = Engine(make_model("qwen3_moe", attention=PROBE), adapter_slots=1)
    path = save_esft(tmp_path / "here", make_model("qwen3_moe"), 1, {1: [0, 5], 3: [2]})
    other = register(engine, save_lora(tmp_path / "other", make_model("qwen3_moe"), 2, ("q_proj",)))
    entry = register(engine, path, "name")
    if state == "resident":
        wait_until_resident(engine.residency, entry)
        engine.residency.release(entry.ref)
    (path / "model.safetensors.index.json").unlink()
    (path / "model-00001-of-000001.safetensors").rename(path / "renamed.safetensors")
    again = register(engine, path, "name")
    assert again.ref == entry.ref
    wait_until_resident(engine.residency, other)  # whatever was there has made room
    engine.residency.release(other.ref)
    request = engine.add(prompts()[1], 8, entry.ref)
    engine.run()
    assert request.tokens == reference(merge(make_model("qwen3_moe"), again), prompts()[1], 8)


def test_registering_again_forgives_a_failure_that_nobody_heard_of(tmp_path: Path) -> None:
    engine = Engine(make_model("llama", attention=PROBE))
    entry = register(engine, save_lora(tmp_path / "here", make_model("llama"), 1, ("q_proj",)), "name")
    (tmp_path / "here").rename(tmp_path / "there")
    assert engine.residency.acquire(entry.ref) is Wait.LOADING

    def has_ended() -> bool:
        engine.residency.poll()
        return not engine.residency.is_loading()

    eventually(has_ended)
    again = register(engine, tmp_path / "there", "name")
    wait_until_resident(engine.residency, again)  # raises if the old failure is still told


def test_a_pinned_adapter_is_brought_in_unasked_and_makes_no_room(tmp_path: Path) -> None:
    engine = Engine(make_model("llama", attention=PROBE), adapter_slots=1)
    residency = engine.residency
    paths = [save_lora(tmp_path / str(seed), make_model("llama"), seed, ("q_proj",)) for seed in (1, 2)]
    first, second = (register(engine, path) for path in paths)
    wait_until_resident(residency, first)
    residency.register(second.ref, second.package, pinned=True)
    residency.poll()
    assert not residency.is_loading()  # the first one is in use
    residency.release(first.ref)
    residency.poll()
    assert residency.is_loading()
    for _ in range(2):  # it waits for nothing: there is no room for as long as the other one is pinned
        with pytest.raises(AdapterFailed, match="1 pinned adapters leave .* bytes and 0 slots") as failed:
            residency.acquire(first.ref)
        assert failed.value.fault is Fault.UNAVAILABLE
        assert wait_until_resident(residency, second) == 1
        residency.release(second.ref)
    residency.register(second.ref, second.package)
    assert wait_until_resident(residency, first) == 1
    residency.check()


def test_a_pinned_adapter_that_fails_is_not_tried_again_until_somebody_asks(tmp_path: Path) -> None:
    engine = Engine(make_model("llama", attention=PROBE))
    residency, loading = engine.residency, SteppedLoading(engine.residency)
    entry = register(engine, save_lora(tmp_path / "a", make_model("llama"), 1, ("q_proj",)))

    def fail() -> None:
        residency.poll()
        loading.run_next(GONE)
        residency.poll()
        loading.run_next()  # its pages are given back
        for _ in range(5):
            residency.poll()
            assert residency.report() == () and not loading.pending
        residency.check()
        assert residency.take_moved()[-1].reason == "No such file or directory"

    residency.register(entry.ref, entry.package, pinned=True)
    fail()
    residency.register(entry.ref, entry.package, pinned=True)
    fail()
    with pytest.raises(AdapterFailed, match="could not be loaded: No such file") as failed:
        residency.acquire(entry.ref)
    assert failed.value.fault is Fault.UNAVAILABLE
    residency.poll()
    loading.run_next()
    residency.poll()
    assert residency.acquire(entry.ref) == 1


def test_a_pinned_adapter_that_can_never_fit_says_so_to_who_asks_for_it(tmp_path: Path) -> None:
    engine = Engine(make_model("llama", attention=PROBE), adapter_bytes=16 * PAGE)
    entry = register(engine, save_lora(tmp_path / "big", make_model("llama"), 1, ("q_proj",), rank=64))
    engine.register(entry.ref, entry.package, pinned=True)
    assert engine.residency.report() == () and not engine.residency._wanted
    answer = engine.add([1], 1, entry.ref)
    engine.run()
    assert f"may use {16 * PAGE:,}" in str(answer.error)


def test_more_experts_than_a_slot_has_room_for_are_refused(tmp_path: Path) -> None:
    engine = Engine(make_model("qwen3_moe", attention=PROBE), max_experts_per_adapter=2)
    entry = register(engine, save_esft(tmp_path / "esft", make_model("qwen3_moe"), 1, {1: [0, 2, 5]}))
    with pytest.raises(AdapterFailed, match="tunes 3 experts of layer 1; there is room for 2"):
        engine.residency.acquire(entry.ref)


def test_residency_under_random_events_keeps_its_books(tmp_path: Path) -> None:
    """The real residency, slabs, stacks and arenas; adapters of both kinds; transfers that fail; too little room."""
    model = make_model("qwen3_moe")
    engine = Engine(make_model("qwen3_moe", attention=PROBE), adapter_slots=3, adapter_bytes=60 * PAGE)
    residency, rng = engine.residency, random.Random(5)
    loading = SteppedLoading(residency)
    paths = [save_lora(tmp_path / f"l{i}", model, i, ("q_proj", "v_proj"), rank=2 + 9 * i) for i in range(3)]
    paths += [save_esft(tmp_path / f"e{i}", model, i, {1: [i, 5], 3: [0, 2, 7][: i + 1]}) for i in range(3)]
    entries = [register(engine, path) for path in paths]
    known = {entry.ref: 0 for entry in entries}  # pins
    pinned: set[AdapterRef] = set()
    seen: set[str] = set()
    for _ in range(3000):
        entry = rng.choice(entries)
        match rng.randrange(6):
            case 0 | 1 if known.get(entry.ref, 2) < 2:  # so that they are not all in use for ever
                try:
                    slot = residency.acquire(entry.ref)
                except AdapterFailed as failed:
                    seen.add(str(failed.fault))
                else:
                    seen.add(str(slot))
                    known[entry.ref] += not isinstance(slot, Wait)
            case 2 if known.get(entry.ref):
                residency.release(entry.ref)
                known[entry.ref] -= 1
            case 3 if loading.pending:
                loading.run_next(rng.choice([None] * 12 + [GONE, NO_MEMORY, CHANGED]))
            case 3 if known.get(entry.ref) == 0 and rng.random() < 0.02:
                residency.quarantine(entry.ref, "its outputs are no numbers")
            case 4 if known.get(entry.ref) == 0:
                residency.forget(entry.ref)
                del known[entry.ref]
            case 5 if entry.ref not in known:
                residency.register(entry.ref, entry.package)
                known[entry.ref] = 0
            case 5 if rng.random() < 0.3:
                residency.register(entry.ref, entry.package, pinned=entry.ref not in pinned)
        if rng.random() < 0.3:
            residency.prefetch([it.ref for it in rng.sample(entries, 3) if it.ref in known])
        before = {it.ref for it in residency.report() if it.state == "resident"} & pinned
        residency.poll()
        residency.check()
        pinned = {ref for ref, it in residency._adapters.items() if it.pinned}
        seen |= {f"pinned {it.state}" for it in residency.report() if it.ref in pinned}
        seen |= {"pinned absent"} if residency._wanted else set()
        assert before & pinned <= {it.ref for it in residency.report() if it.state == "resident"}
    assert {"unavailable", "quarantined", "Wait.LOADING", "Wait.NO_ROOM", "1", "2", "3", "pinned absent",
            "pinned loading", "pinned resident"} <= seen  # fmt: skip
    while loading.pending:
        loading.run_next()
        residency.poll()
    for ref, pins in known.items():
        for _ in range(pins):
            residency.release(ref)
        residency.forget(ref)
    residency.poll()
    residency.check()
    loading.run_all()
    assert residency.report() == () and residency._pool.num_used == 0
    assert engine.assembly.tables.lora._slabs._arena.num_backed_pages == 0  # type: ignore[attr-defined]


def test_two_names_of_the_same_weights_have_one_slot_and_their_pages_once(tmp_path: Path) -> None:
    engine = Engine(make_model("llama", attention=PROBE))
    path = save_lora(tmp_path / "a", make_model("llama"), 1, ("q_proj",), rank=64)
    first, second = (register(engine, path, name) for name in ("first", "second"))
    assert first.ref == second.ref
    expected = reference(merge(make_model("llama"), first), prompts()[1], 8)
    slots = [wait_until_resident(engine.residency, entry) for entry in (first, second)]
    (on_device,) = engine.residency.report()
    assert slots == [1, 1] and on_device.pins == 2
    assert on_device.bytes == 32 * PAGE and engine.residency._pool.num_used == 32
    for entry in (second, first):
        engine.residency.release(entry.ref)
    answers = [engine.add(prompts()[1], 8, entry.ref) for entry in (first, second)]
    engine.run()
    assert [it.tokens for it in answers] == [expected] * 2
    engine.remove(second.ref)
    assert engine.gone == [AdapterGone(first.ref, 32 * PAGE)] and engine.residency.report() == ()
    engine.residency.check()


def test_an_adapter_that_is_forgotten_says_how_much_it_occupied(tmp_path: Path) -> None:
    engine = Engine(make_model("llama", attention=PROBE))
    residency, loading = engine.residency, SteppedLoading(engine.residency)
    entry = register(engine, save_lora(tmp_path / "a", make_model("llama"), 1, ("q_proj",), rank=64))
    assert residency.forget(entry.ref) == 0
    residency.register(entry.ref, entry.package)
    assert residency.acquire(entry.ref) is Wait.LOADING
    assert residency.forget(entry.ref) == 32 * PAGE
    loading.run_next()
    residency.poll()
    assert residency._pool.num_used == 0
    residency.check()


class Unwalked(dict[AdapterRef, Any]):
    """Nobody may go through all of it."""

    def _refuse(self, *_: object) -> Any:
        raise AssertionError("a step went through all known adapters")

    __iter__ = keys = values = items = _refuse


def test_a_step_looks_at_what_is_on_the_device_and_not_at_all_that_is_known(tmp_path: Path) -> None:
    engine = Engine(make_model("llama", attention=PROBE), adapter_slots=1)
    residency = engine.residency
    for number in range(20_000):
        residency.register(AdapterRef(f"n{number}", f"r{number}", "lora"), AdapterPackage("lora", f"r{number}", (), ()))
    paths = [save_lora(tmp_path / str(seed), make_model("llama"), seed, ("q_proj",)) for seed in (1, 2)]
    first, second = (register(engine, path) for path in paths)
    residency._adapters = Unwalked(residency._adapters)
    assert residency.report() == () and not residency.is_loading()
    for entry in (first, second):  # the second takes the first one's place
        wait_until_resident(residency, entry)
        residency.release(entry.ref)
        assert [it.ref for it in residency.report()] == [entry.ref] and not residency.is_loading()
    residency.forget(second.ref)
    assert residency.report() == ()


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
