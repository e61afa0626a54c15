"""Operands read a block at a time say what the whole says."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from adapters_store import operands
from adapters_store.files import Folder, OpenFile
from adapters_store.limits import Limits
from adapters_store.operands import blocks, times
from adapters_store.parts import AdapterPackage, Assembled, Operand, Piece, SourceFile, TensorRef, Whole
from adapters_store.safetensors_file import read_header
from tests.support.adapter_files import operand as dense

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
STORED = (6, 5, 4)


@pytest.fixture(params=[1 << 20, 200, 30, 1])
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """All in one block, and down to a number in each."""
    monkeypatch.setattr(operands, "_BLOCK_BYTES", request.param)
    return int(request.param)


@pytest.fixture(params=DTYPES)
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> TensorRef:
    """One of STORED behind another tensor, with the smallest and the largest numbers of its type."""
    tensor = torch.randn(STORED).to(DTYPES[request.param])
    info = torch.finfo(tensor.dtype)
    tensor.view(-1)[:4] = torch.tensor([0.0, -info.smallest_normal, info.max, -info.smallest_normal / 4])
    save_file({"a": torch.ones(7, dtype=torch.int8).float(), "b": tensor}, tmp_path / "x")
    with Folder(str(tmp_path), (os.path.realpath(tmp_path),)) as folder:
        return next(it for it in read_header(folder.open("x"), Limits()).tensors if it.key == "b")


def package(directory: Path) -> AdapterPackage:
    files = tuple(SourceFile(it.name, str(it), it.stat().st_size, "") for it in directory.iterdir())
    return AdapterPackage("lora", "1", files, ())


def views(of: TensorRef) -> list[TensorRef]:
    """As it is, as matrix and row, cut, and in every order of its dimensions."""
    rng, found = random.Random(3), []
    for shape in (STORED, (30, 4), (6, 20), (120,)):
        found.append(TensorRef(of.file, of.key, shape, of.dtype, of.offset))
        for _ in range(8):
            order = tuple(rng.sample(range(len(shape)), len(shape)))
            seen = tuple(shape[dimension] for dimension in order)
            start = tuple(rng.randrange(size) for size in seen)
            cut = tuple(rng.randint(1, size - at) for size, at in zip(seen, start, strict=True))
            found.append(TensorRef(of.file, of.key, cut, of.dtype, of.offset, Whole(shape, start, order)))
    return found


def opened(directory: Path) -> OpenFile:
    return OpenFile(os.open(directory / "x", os.O_RDONLY), "x", "")


def test_blocks_cover_a_tensor_once(stored: TensorRef, tmp_path: Path, block_bytes: int) -> None:
    file = opened(tmp_path)
    for ref in views(stored):
        found = np.full(ref.shape, np.nan, np.float32)
        for start, block in blocks(ref, file):
            place = tuple(slice(at, at + size) for at, size in zip(start, block.shape, strict=True))
            assert np.isnan(found[place]).all() and found[place].shape == block.shape
            found[place] = block
        assert np.array_equal(found, dense(package(tmp_path), ref).float().numpy())
    os.close(file.descriptor)


@pytest.mark.parametrize("shared", [False, True], ids=["an input each", "an input for all"])
def test_products_of_every_kind_of_operand(stored: TensorRef, tmp_path: Path, block_bytes: int, shared: bool) -> None:
    file = opened(tmp_path)

    def ref(shape: tuple[int, ...], whole: Whole | None = None) -> TensorRef:  # without the type's largest numbers
        return TensorRef("x", "b", shape, stored.dtype, stored.offset, whole or Whole((6, 5, 4), (1, 0, 0)))

    plain = ref((5, 5, 4))
    experts = ref((4, 5, 5), Whole((6, 5, 4), (0, 1, 0), (2, 0, 1)))
    kinds: list[Operand] = [
        ref((20, 4), Whole((30, 4), (5, 0))),
        plain,
        experts,
        ref((1, 5, 4)),
        Assembled((9, 8), tuple(Piece(ref((3, 2), Whole((30, 4), (8, at))), (3 * at, 3 * at), 0.5) for at in (0, 2))),
        Assembled((7, 6, 5), (Piece(ref((1, 5, 4)), (2, 0, 1), 3.0), Piece(experts, (3, 1, 0)))),
    ]
    for operand in kinds:
        stack = operand.shape[:-2]
        x = np.random.default_rng(1).standard_normal(((1,) if stack and shared else stack) + operand.shape[-1:])
        expected = dense(package(tmp_path), operand).numpy() @ x[..., None]
        found = times(operand, x.astype(np.float32), {"x": file})
        np.testing.assert_allclose(found, expected[..., 0], rtol=1e-4, atol=1e-4)
    one_for_all = ref((1, 5, 4))
    x = np.random.default_rng(2).standard_normal((3, 4)).astype(np.float32)
    expected = dense(package(tmp_path), one_for_all).numpy() @ x[..., None]
    np.testing.assert_allclose(times(one_for_all, x, {"x": file}), expected[..., 0], rtol=1e-4, atol=1e-4)
    os.close(file.descriptor)
