"""The tiers of an adapter: disk, host memory, the device, and quarantine."""

import time
from pathlib import Path

import pytest

from adapters_store.ref import AdapterRef
from server.engine.request import Fault, Tier
from server.engine.residency import AdapterFailed, Wait
from server.model.probe import PROBE
from tests.support.engine_harness import Engine, prompts
from tests.support.stepped_residency import wait_until_resident
from tests.support.tiny_adapters import merge, register, save_lora
from tests.support.tiny_models import make_model, reference
from tests.support.waiting import eventually


@pytest.mark.parametrize("host_cache_bytes", [0, 1 << 22])
def test_bytes_that_are_not_what_was_verified_put_it_in_quarantine_until_it_is_registered_again(
    tmp_path: Path, host_cache_bytes: int
) -> None:
    engine = Engine(make_model("llama", attention=PROBE), host_cache_bytes=host_cache_bytes)
    path = save_lora(tmp_path / "a", make_model("llama"), 1, ("q_proj",))
    entry, other = (
        register(engine, path),
        register(engine, save_lora(tmp_path / "b", make_model("llama"), 2, ("q_proj",))),
    )
    weights = path / "adapter_model.safetensors"
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    fine, bad = engine.add([1, 2], 3, other.ref), engine.add([1, 2], 3, entry.ref)
    engine.run()
    assert bad.error is not None and "is in quarantine: adapter_model.safetensors changed" in bad.error
    assert bad.fault is Fault.QUARANTINED and fine.error is None and len(fine.tokens) == 3
    weights.write_bytes(sound)
    assert engine.add([1, 2], 3, entry.ref).error is None
    engine.run()
    assert engine.residency._adapters[entry.ref].tier is Tier.QUARANTINED, "that the file is as it was changes nothing"
    engine.register(entry.ref, entry.package)
    again = engine.add([1, 2], 3, entry.ref)
    engine.run()
    assert again.tokens == reference(merge(make_model("llama"), entry), [1, 2], 3)
    engine.residency.check()


def test_what_is_put_in_quarantine_while_it_is_used_leaves_when_the_last_pin_does(tmp_path: Path) -> None:
    engine = Engine(make_model("llama", attention=PROBE))
    residency = engine.residency
    entry = register(engine, save_lora(tmp_path / "a", make_model("llama"), 1, ("q_proj",)))
    wait_until_resident(residency, entry)
    residency.quarantine(entry.ref, "its outputs are no numbers")
    residency.check()
    with pytest.raises(AdapterFailed, match="is in quarantine: its outputs are no numbers"):
        residency.acquire(entry.ref)
    assert residency._pool.num_used > 0
    residency.register(entry.ref, entry.package)  # what is there is not trusted, all the same
    assert residency.acquire(entry.ref) is Wait.LOADING
    residency.release(entry.ref)
    assert residency._pool.num_used == 0 and residency.acquire(entry.ref) is Wait.LOADING
    residency.check()
    assert wait_until_resident(residency, entry) == 1


def test_what_makes_room_comes_back_from_the_host_cache(tmp_path: Path) -> None:
    engine = Engine(make_model("llama", attention=PROBE), adapter_slots=1, host_cache_bytes=2 << 20)
    paths = [save_lora(tmp_path / str(seed), make_model("llama"), seed, ("q_proj",)) for seed in range(3)]
    first, second, third = (register(engine, path) for path in paths)
    for entry in (first, second):
        wait_until_resident(engine.residency, entry)
        engine.residency.release(entry.ref)
    tiers = {moved.ref: moved.tier for moved in engine.residency.take_moved()}
    assert tiers == {first.ref: Tier.HOST, second.ref: Tier.RESIDENT}
    for file in paths[0].iterdir():
        file.unlink()  # it is not needed any more
    answer = engine.add(prompts()[1], 5, first.ref)
    engine.run()
    assert answer.error is None and len(answer.tokens) == 5
    wait_until_resident(engine.residency, third)  # its copy takes the place of the one that was used longest ago
    engine.residency.check()
    tiers |= {moved.ref: moved.tier for moved in engine.residency.take_moved()}
    assert tiers == {first.ref: Tier.HOST, second.ref: Tier.ABSENT, third.ref: Tier.RESIDENT}


def test_who_waits_is_brought_nearer_and_takes_nobodys_room(tmp_path: Path) -> None:
    engine = Engine(make_model("llama", attention=PROBE), adapter_slots=2, host_cache_bytes=4 << 20)
    residency = engine.residency
    paths = [save_lora(tmp_path / str(seed), make_model("llama"), seed, ("q_proj",)) for seed in range(3)]
    first, second, third = (register(engine, path) for path in paths)
    wait_until_resident(residency, first)
    residency.release(first.ref)

    def on_the_host(ref: AdapterRef) -> bool:
        residency.prefetch([second.ref, third.ref])
        residency.poll()
        residency.check()
        return residency._adapters[ref].tier is Tier.HOST

    eventually(lambda: on_the_host(third.ref))
    for _ in range(50):  # and it stays so
        assert on_the_host(third.ref)
        time.sleep(0.001)
    tiers = {ref: residency._adapters[ref].tier for ref in (first.ref, second.ref, third.ref)}
    assert tiers == {first.ref: Tier.RESIDENT, second.ref: Tier.RESIDENT, third.ref: Tier.HOST}
