"""The engine over a fake GPU's memory: the same answers, from pages of 2 MiB that a thread of its own maps."""

from pathlib import Path

import pytest

from server.engine.request import FinishReason
from server.weights.arena import PageWork
from server.weights.transfer import Transfer
from tests.support.cuda_fake_driver import GRANULE, NO_MEMORY
from tests.support.engine_harness import prompts
from tests.support.fake_gpu import FakeGpu, gpu_engine, serve_both_kinds
from tests.support.stepped_residency import SteppedLoading, wait_until_resident
from tests.support.tiny_adapters import merge, register, save_lora
from tests.support.tiny_models import make_model, reference
from tests.support.waiting import eventually


def test_the_engine_serves_from_pages_of_2_mib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both kinds, evictions, staged copies; nothing maps on the thread of the step loop once the model is loaded."""
    fake = FakeGpu(total_bytes=256 * GRANULE)
    engine = gpu_engine(monkeypatch, fake, "qwen3_moe", adapter_slots=2, max_experts_per_adapter=3)
    num_base = len(fake.driver.mapped)
    fake.driver.log.clear()
    serve_both_kinds(engine, tmp_path)
    threads = {thread for name, thread, _ in fake.driver.log if name.startswith("cuMem")}
    assert threads == {"adapter-pages"}
    eventually(lambda: len(fake.driver.mapped) == num_base)


def test_out_of_memory_fails_the_transfer_and_nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = FakeGpu()
    engine = gpu_engine(monkeypatch, fake)
    model = make_model("llama")
    good, bad = (register(engine, save_lora(tmp_path / str(i), model, i, ("q_proj",))) for i in range(2))
    wait_until_resident(engine.residency, good)
    fake.driver.failures = {"cuMemCreate": [NO_MEMORY]}
    victim, other = (engine.add(prompts()[1], 5, entry.ref) for entry in (bad, good))
    engine.run()
    assert victim.finish is FinishReason.ERROR
    assert "cuMemCreate of 2,097,152 bytes" in str(victim.error)
    assert other.tokens == reference(merge(make_model("llama"), good), prompts()[1], 5)
    engine.residency.check()
    again = engine.add(prompts()[1], 5, bad.ref)
    engine.run()
    assert again.tokens == reference(merge(make_model("llama"), bad), prompts()[1], 5)


def test_staged_bytes_are_hashed_and_compared_before_they_are_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = FakeGpu()
    engine = gpu_engine(monkeypatch, fake)
    entry = register(engine, save_lora(tmp_path / "a", make_model("llama"), 1, ("q_proj",), rank=40))
    assert entry.package.file_bytes > 2 * 8192  # more than the buffers hold
    file = Path(entry.package.files[0].path)
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 0x80
    file.write_bytes(raw)
    request = engine.add(prompts()[1], 5, entry.ref)
    engine.run()
    assert "changed after it was registered" in str(request.error)
    assert engine.residency.shape_key(1).rank == 0
    engine.residency.check()


def test_an_evicted_slot_is_unmapped_before_it_is_mapped_for_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """While nothing is done at all, the books are exact: the same slot, given up and taken, three times."""
    fake = FakeGpu()
    engine = gpu_engine(monkeypatch, fake, adapter_slots=1)
    residency, loading = engine.residency, SteppedLoading(engine.residency)
    model = make_model("llama")
    entries = [register(engine, save_lora(tmp_path / str(i), model, i, ("q_proj",))) for i in range(3)]
    fake.cuda.is_busy = True
    for number, entry in enumerate(entries):
        residency.acquire(entry.ref)
        residency.check()
        assert [type(job) for job in loading.pending] == [PageWork] * (number > 0) + [Transfer]
        assert residency._pool.num_used == 1 and len(fake.driver.mapped) == (number > 0)
        loading.run_all()
        residency.poll()
        assert residency.is_loading()  # the copies are not over
        fake.cuda.is_busy = False
        for adapter in residency._adapters.values():
            if adapter.job is not None:
                adapter.job._copies._landed.is_over = True  # type: ignore[attr-defined]
        residency.poll()
        assert residency.acquire(entry.ref) == 1
        residency.release(entry.ref)
        assert fake.cuda.log[-1][:2] == ("wait_event", "compute")
        fake.cuda.is_busy = True
    names = [name for name, *_ in fake.driver.log if name in ("cuMemCreate", "cuMemMap", "cuMemUnmap")]
    assert names == ["cuMemCreate", "cuMemMap", "cuMemUnmap", "cuMemMap", "cuMemUnmap", "cuMemMap"]
