"""A GPU's pages, copies and streams on the fake driver, and engines that serve from them."""

from pathlib import Path

import pytest
import torch

from server.model.probe import PROBE
from server.weights.arena import VirtualArena, VirtualArenas
from server.weights.cuda_arena import CudaPages
from server.weights.cuda_driver import CudaDriver
from server.weights.staging import HostCopy, PinnedCopy
from tests.support.cuda_fake_driver import GRANULE, FakeBindings, FakeCuda
from tests.support.engine_harness import Engine, prompts
from tests.support.tiny_adapters import merge, register, save_esft, save_lora
from tests.support.tiny_models import make_model, reference

CPU = torch.device("cpu")


class FakeGpu:
    """Pages over a fake driver and fake streams, with one log for both."""

    def __init__(self, total_bytes: int = 64 * GRANULE, max_spare: int = 4) -> None:
        self.driver = FakeBindings(total_bytes)
        self.cuda = FakeCuda()
        self.pages = CudaPages(CudaDriver(self.driver, 0), CPU, max_spare, self.cuda)
        self.arenas = VirtualArenas(self.pages)

    def arena(self, num_bytes: int = 1 << 40) -> VirtualArena:
        return VirtualArena(num_bytes, self.pages)

    def granules(self) -> set[int]:
        """Numbers of the mapped granules, in the only reservation."""
        (base,) = self.driver.reserved
        return {(address - base) // GRANULE for address in self.driver.mapped}


def engine_with(monkeypatch: pytest.MonkeyPatch, family: str, arenas: object, copier: object = None,
                **settings: object) -> Engine:  # fmt: skip
    monkeypatch.setattr("server.assembly.choose_arenas", lambda device: arenas)
    monkeypatch.setattr("server.assembly.choose_copier", lambda device: copier or HostCopy())
    return Engine(make_model(family, attention=PROBE), **settings)


def gpu_engine(monkeypatch: pytest.MonkeyPatch, fake: FakeGpu, family: str = "llama", **settings: object) -> Engine:
    buffers = [torch.empty(8192, dtype=torch.uint8) for _ in range(2)]
    copier = PinnedCopy(buffers, torch.empty(8192, dtype=torch.uint8), CPU, fake.cuda)
    return engine_with(monkeypatch, family, fake.arenas, copier, **settings)


def serve_both_kinds(engine: Engine, tmp_path: Path) -> None:
    """More adapters than slots, of both kinds, each answer as by the merged model alone."""
    model = make_model("qwen3_moe")
    entries = [register(engine, save_lora(tmp_path / f"l{i}", model, i, ("q_proj", "v_proj"))) for i in range(2)]
    entries += [register(engine, save_esft(tmp_path / f"e{i}", model, i, {1: [i, 5], 3: [0, 2]})) for i in range(2)]
    wanted = [(entry, prompt) for entry in entries for prompt in prompts(3)[1:]]
    requests = [engine.add(prompt, 4, entry.ref) for entry, prompt in wanted]
    engine.run(lambda _: engine.residency.check())
    for (entry, prompt), request in zip(wanted, requests, strict=True):
        assert request.tokens == reference(merge(make_model("qwen3_moe"), entry), prompt, 4)
    for entry in entries:
        engine.remove(entry.ref)
    engine.residency.check()
    assert engine.residency._pool.num_used == 0
