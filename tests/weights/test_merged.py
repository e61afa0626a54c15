"""Merged matrices, row by row, out of an adapter's files: against dense changes made by other means."""

from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from adapters_store.base_spec import BaseSpec, ExpertStack
from adapters_store.parts import AdapterPackage, Assembled, LowRank, Part, Piece
from server.weights.merged import MergedAdapter, MergedRows
from tests.support.adapter_files import BASE, delta, esft, operand, read_adapter, save_peft
from tests.support.waiting import eventually

M, H, I = 4, 10, 6  # noqa: E741
ATTN = "model.layers.0.self_attn"
EXPERTS = "model.layers.1.mlp.experts"
MIXTURE = BaseSpec("mixture", {f"{ATTN}.q_proj": (H, H)}, {1: ExpertStack(M, H, I, EXPERTS)})
PHI = BaseSpec("phi3", {f"{ATTN}.qkv_proj": (16, H)}, {}, fused={f"{ATTN}.qkv_proj": (8, 4, 4)})


def opened(package: AdapterPackage, parts: list[Part] | None = None) -> MergedAdapter:
    it = MergedAdapter(package.files, package.parts if parts is None else parts)
    eventually(it.is_ready)
    return it


def in_blocks(rows: MergedRows, base: Tensor, count: int) -> Tensor:
    before = base.clone()
    found = torch.cat([rows(base[at : at + count], at) for at in range(0, len(base), count)])
    assert torch.equal(base, before), "the base's own weights were written"
    return found


def pair(name: str, inputs: int, outputs: int, rank: int = 2) -> dict[str, Tensor]:
    return {f"{name}.lora_A.weight": torch.randn(rank, inputs), f"{name}.lora_B.weight": torch.randn(outputs, rank)}


@pytest.mark.parametrize("count", [1, 3, 16])
def test_rows_of_a_linear_that_the_file_has_in_pieces(tmp_path: Path, count: int) -> None:
    tensors = pair(f"{ATTN}.q_proj", H, 8) | pair(f"{ATTN}.v_proj", H, 4, rank=3)
    config = {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"v_proj": 1}}
    package = read_adapter(save_peft(tmp_path / "a", tensors, **config), PHI)
    it, base = opened(package), torch.randn(16, H)
    assert list(it.linears) == [f"{ATTN}.qkv_proj"]
    expected = base + delta(package, f"{ATTN}.qkv_proj").float()
    torch.testing.assert_close(in_blocks(it.linear(f"{ATTN}.qkv_proj"), base, count), expected)
    assert torch.equal(base[8:12], expected[8:12])  # k is as it was
    it.close()


def test_a_piece_of_another_scale(tmp_path: Path) -> None:
    package = read_adapter(save_peft(tmp_path / "a", pair(f"{ATTN}.q_proj", H, H)), MIXTURE)
    (part,) = package.parts
    assert isinstance(part, LowRank)
    halved = Assembled((H, 2), tuple(msgspec.structs.replace(it, factor=0.5) for it in part.b.pieces))
    assert isinstance(halved.pieces[0], Piece)
    it, base = opened(package, [msgspec.structs.replace(part, b=halved)]), torch.randn(H, H)
    torch.testing.assert_close(it.linear(part.module)(base, 0), base + 0.5 * delta(package, part.module).float())
    it.close()


@pytest.mark.parametrize("count", [2, 10])
def test_rows_are_scaled_to_their_magnitudes(tmp_path: Path, count: int) -> None:
    name = f"{ATTN}.q_proj"
    tensors = pair(name, H, H) | {f"{name}.lora_magnitude_vector": torch.rand(H) + 1}
    package = read_adapter(save_peft(tmp_path / "a", tensors, use_dora=True), MIXTURE)
    it, base = opened(package), torch.randn(H, H)
    merged = in_blocks(it.linear(name), base, count)
    torch.testing.assert_close(merged.norm(dim=1), tensors[f"{name}.lora_magnitude_vector"])
    direction = base + delta(package, name).float()
    torch.testing.assert_close(merged / merged.norm(dim=1)[:, None], direction / direction.norm(dim=1)[:, None])
    it.close()


@pytest.mark.parametrize("matrices", [("gate_proj",), ("up_proj",), ("gate_proj", "up_proj", "down_proj")])
def test_experts_of_which_the_file_has_some_matrices(tmp_path: Path, matrices: tuple[str, ...]) -> None:
    shapes = {"gate_proj": (H, I), "up_proj": (H, I), "down_proj": (I, H)}
    tensors: dict[str, Tensor] = {}
    for expert in range(M):
        for matrix in matrices:
            tensors |= pair(f"{EXPERTS}.{expert}.{matrix}", *shapes[matrix])
    package = read_adapter(save_peft(tmp_path / "a", tensors), MIXTURE)
    it = opened(package)
    assert it.acts_on_experts(1, EXPERTS) and not it.acts_on_experts(2, "model.layers.2.mlp.experts")
    assert not it.linears
    experts = it.experts(1, EXPERTS)
    changed = {part.module.rpartition(".")[2]: delta(package, part.module).float() for part in package.parts
               if isinstance(part, LowRank)}  # fmt: skip
    for expert in range(M):
        gate, up, down = torch.randn(I, H), torch.randn(I, H), torch.randn(H, I)
        expected = [
            base + changed[matrix][expert] if matrix in changed else base
            for base, matrix in ((gate, "gate_proj"), (up, "up_proj"), (down, "down_proj"))
        ]
        if "gate_up_proj" in changed:
            expected[:2] = (torch.cat([gate, up]) + changed["gate_up_proj"][expert]).chunk(2)
        found = in_blocks(experts.gate_up(expert), torch.cat([gate, up]), 5)
        torch.testing.assert_close(found, torch.cat(expected[:2]))
        torch.testing.assert_close(in_blocks(experts.down(expert), down, 4), expected[2])
    it.close()


def test_replaced_experts_are_the_files_and_others_the_bases(tmp_path: Path) -> None:
    package = read_adapter(esft(tmp_path / "a", {1: [2, 0]}), BASE)
    it = opened(package)
    stack = BASE.experts[1]
    hidden, inner = stack.hidden_size, stack.intermediate_size
    assert it.acts_on_experts(1, stack.name) and not it.acts_on_experts(2, BASE.experts[2].name)
    experts = it.experts(1, stack.name)
    gate_up, down = torch.randn(2 * inner, hidden), torch.randn(hidden, inner)
    for part in package.parts:
        assert not isinstance(part, LowRank)
        halves = torch.cat([operand(package, tensor).float() for tensor in part.gate_up])
        assert torch.equal(in_blocks(experts.gate_up(part.expert), gate_up, 5), halves)
        assert torch.equal(in_blocks(experts.down(part.expert), down, 3), operand(package, part.down).float())
    assert torch.equal(experts.gate_up(1)(gate_up, 0), gate_up) and torch.equal(experts.down(3)(down, 0), down)
    it.close()


def test_a_file_that_is_another_now_is_not_read(tmp_path: Path) -> None:
    package = read_adapter(save_peft(tmp_path / "a", pair(f"{ATTN}.q_proj", H, H)), MIXTURE)
    file = tmp_path / "a" / "adapter_model.safetensors"
    for content in (file.read_bytes()[:-1] + b"\0", file.read_bytes()[:-4], b""):
        file.write_bytes(content)
        it = opened(package)
        with pytest.raises(ValueError, match="adapter_model.safetensors changed after it was registered"):
            it.linear(f"{ATTN}.q_proj")
        it.close()
    file.unlink()
    it = opened(package)
    with pytest.raises(FileNotFoundError):
        it.linear(f"{ATTN}.q_proj")
    it.close()
