"""What stands in for virtual memory: room taken at once, blocks of their true size."""

from pathlib import Path

import pytest
import torch

from server.engine.residency import AdapterFailed
from server.weights.arena import ArenaError
from server.weights.padded_arena import BlockArena, PaddedArenas
from server.weights.page_pool import own_pool
from tests.support.fake_gpu import engine_with, serve_both_kinds
from tests.support.tiny_adapters import register, save_lora
from tests.support.tiny_models import make_model

CPU = torch.device("cpu")


def test_padded_stacks_take_their_room_from_the_budget_at_once() -> None:
    pool = own_pool(1 << 20, PaddedArenas.page_bytes)
    arenas = PaddedArenas(CPU)
    arena = arenas.stack(num_bytes=700_000, base_bytes=512 * 100, pool=pool)
    assert pool.num_withdrawn == -(-700_000 // 512) - 100 and pool.num_free == 2048 - pool.num_withdrawn
    assert arena.pages_to_map(512 * 100, 5000) == arena.map(512 * 100, 5000) == arena.unmap(512 * 100, 5000) == 0
    assert arena.num_mapped_pages == 100  # the base's
    with pytest.raises(ArenaError, match=r"649,216 bytes .* where 399,360 are left of 1,048,576 \(adapter_bytes\)"):
        arenas.stack(num_bytes=700_000, base_bytes=512 * 100, pool=pool)


def test_blocks_are_allocated_at_their_true_size() -> None:
    arena = PaddedArenas(CPU).slabs(1 << 45)
    assert isinstance(arena, BlockArena)
    assert arena.pages_to_map(1 << 40, 1000) == arena.map(1 << 40, 1000) == 2
    assert arena.map(1 << 20, 512) == 1
    arena.tensor((1 << 40) + 64, (3, 4), torch.bfloat16).fill_(2)
    assert (arena.tensor((1 << 40) + 64, (12,), torch.bfloat16) == 2).all()
    arena.check([(1 << 40, 1000), (1 << 20, 512)])
    assert arena.unmap(1 << 40, 1000) == 2 and arena.num_mapped_pages == 1


def test_padded_arenas_serve_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = engine_with(
        monkeypatch, "qwen3_moe", PaddedArenas(CPU), adapter_slots=2, max_experts_per_adapter=3, adapter_bytes=1 << 20
    )
    assert engine.residency._pool.num_withdrawn > 0
    serve_both_kinds(engine, tmp_path)
    big = register(engine, save_lora(tmp_path / "big", make_model("qwen3_moe"), 1, ("q_proj", "v_proj"), rank=640))
    fixed = engine.residency._pool.num_withdrawn * 512
    message = (
        rf"may use {(1 << 20) - fixed:,} \(raise --adapter-bytes less {fixed:,} that expert places take, used or not\)"
    )
    with pytest.raises(AdapterFailed, match=message):
        engine.residency.acquire(big.ref)
