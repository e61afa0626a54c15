"""Where the bytes of a tensor may lie: in a file, in a block of a larger tensor, in a file that a reader wrote."""

import hashlib
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from adapters_store.parts import SourceFile, TensorRef, Whole
from server.weights.failures import LoadFailure
from server.weights.tables.table import Prepared
from tests.support.transfers import WAYS, run, transfer


def source(path: Path) -> SourceFile:
    raw = path.read_bytes()
    return SourceFile(path.name, str(path.resolve()), len(raw), hashlib.sha256(raw).hexdigest())


def offset_of(path: Path, key: str) -> int:
    """By searching for its bytes, as a reader would not."""
    with safe_open(path, framework="pt") as file:
        tensor = file.get_tensor(key)
    return path.read_bytes().index(tensor.contiguous().view(torch.uint8).numpy().tobytes())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_a_tensor_go_to_places_of_their_own(tmp_path: Path, way: str, dtype: torch.dtype) -> None:
    path = tmp_path / "packed.safetensors"
    stored, other = torch.randn(6, 20, dtype=dtype), torch.randn(7, dtype=dtype)
    save_file({"b": stored, "c": other}, path)
    name = "F32" if dtype is torch.float32 else "BF16"

    def block(rows: int, columns: int, at: tuple[int, int]) -> TensorRef:
        return TensorRef(path.name, "b", (rows, columns), name, offset_of(path, "b"), Whole((6, 20), at))

    whole = TensorRef(path.name, "b", (6, 20), name, offset_of(path, "b"))
    refs = [whole, whole, block(6, 5, (0, 5)), block(6, 5, (0, 15)), block(2, 20, (3, 0)), block(1, 1, (5, 19)),
            TensorRef(path.name, "c", (7,), name, offset_of(path, "c"))]  # fmt: skip
    places = [torch.full(ref.shape, torch.nan) for ref in refs]
    assert run(transfer([source(path)], zip(refs, places, strict=True), way)).failure is None
    expected = [stored, stored, stored[:, 5:10], stored[:, 15:], stored[3:5], stored[5:, 19:], other]
    assert all(torch.equal(place, it.float()) for place, it in zip(places, expected, strict=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dimensions_may_be_in_another_order(tmp_path: Path, way: str, dtype: torch.dtype) -> None:
    """As the experts of B are: column j * experts + e of what is stored is column j of expert e."""
    path = tmp_path / "experts.safetensors"
    out, rank, experts = 5, 3, 4
    stored = torch.randn(out, rank * experts, dtype=dtype)
    save_file({"b": stored}, path)
    name = "F32" if dtype is torch.float32 else "BF16"
    offset = offset_of(path, "b")

    def ref(shape: tuple[int, ...], start: tuple[int, ...]) -> TensorRef:
        return TensorRef(path.name, "b", shape, name, offset, Whole((out, rank, experts), start, (2, 0, 1)))

    refs = [ref((experts, out, rank), (0, 0, 0)), ref((1, out, rank), (2, 0, 0)), ref((2, 2, 1), (1, 3, 2))]
    places = [torch.full(ref.shape, torch.nan) for ref in refs]
    assert run(transfer([source(path)], zip(refs, places, strict=True), way)).failure is None
    whole = torch.stack([stored[:, expert::experts] for expert in range(experts)]).float()
    expected = [whole, whole[2:3], whole[1:3, 3:, 2:]]
    assert all(torch.equal(place, it) for place, it in zip(places, expected, strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_pieces_go_into_a_matrix_that_was_cleared(tmp_path: Path, way: str) -> None:
    """Two updates of a fused linear's parts, as one of the whole: blocks on the diagonal, and zeros beside them."""
    path = tmp_path / "parts.safetensors"
    first, second = torch.randn(3, 2), torch.randn(4, 3)
    save_file({"k": first, "q": second}, path)
    room = torch.full((7, 5), torch.nan)
    places = [
        (TensorRef(path.name, "k", (3, 2), "F32", offset_of(path, "k")), room[:3, :2]),
        (TensorRef(path.name, "q", (4, 3), "F32", offset_of(path, "q")), room[3:, 2:]),
    ]
    clearing = partial(Prepared._replace, cleared=[room])
    assert run(transfer([source(path)], places, way, clearing)).failure is None
    torch.testing.assert_close(room, torch.block_diag(first, second))


def test_a_file_that_a_reader_wrote_is_a_source_like_any_other(tmp_path: Path) -> None:
    """Numbers alone, without a header; and hashed as it is copied."""
    blob = tmp_path / "canonical"
    matrix = torch.randn(3, 4)
    blob.write_bytes(b"ahead" * 4 + matrix.numpy().tobytes())
    place = torch.empty(3, 4)
    ref = TensorRef(blob.name, "rewritten", (3, 4), "F32", 20)
    assert run(transfer([source(blob)], [(ref, place)])).failure is None and torch.equal(place, matrix)
    verified = source(blob)
    blob.write_bytes(b"ahead" * 4 + (matrix + 1).numpy().tobytes())
    failure = run(transfer([verified], [(ref, place)])).failure
    assert failure is not None and failure.is_final and "changed after it was registered" in failure.reason


@pytest.mark.parametrize("way", WAYS)
def test_what_is_derived_comes_behind_the_copies_and_before_the_transfer_is_done(tmp_path: Path, way: str) -> None:
    """A row's norm of the base and what was copied, say."""
    path = tmp_path / "a.safetensors"
    delta, base = torch.randn(4, 5), torch.randn(4, 5)
    save_file({"delta": delta}, path)
    place, norms = torch.empty(4, 5), torch.empty(4)
    ref = TensorRef(path.name, "delta", (4, 5), "F32", offset_of(path, "delta"))

    def derive() -> None:
        assert not it.done
        torch.linalg.vector_norm(base + place, dim=1, out=norms)

    it = transfer([source(path)], [(ref, place)], way, derive=[derive])
    assert run(it).failure is None
    torch.testing.assert_close(norms, (base + delta).norm(dim=1))


def test_a_failure_to_derive_is_the_adapters(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(1)}, path)

    def derive() -> None:
        raise RuntimeError("out of memory")

    assert run(transfer([source(path)], [], derive=[derive])).failure == LoadFailure("out of memory", is_final=False)


def test_a_place_that_no_file_fills_fails_the_transfer() -> None:
    ref = TensorRef("elsewhere", "a", (1,), "F32")
    told = "elsewhere is not among the adapter's files; register it again"
    assert run(transfer([], [(ref, torch.zeros(1))])).failure == LoadFailure(told, is_final=True)
