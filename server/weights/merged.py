"""What the base's matrices are with an adapter merged into them, out of the adapter's own files.

What is served is compared with this, so it shares nothing with transfers and tables: a mistake of theirs in a place, an
order, a scale or a type would else be made twice. Everything is in float32, a few rows at a time.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adapters_store.errors import clean
from adapters_store.files import open_resolved, read_exactly
from adapters_store.parts import BYTES_PER_ELEMENT, ExpertReplacement, LowRank, Operand, Part, SourceFile, TensorRef

# (rows [begin, begin + n) of the base's matrix [n, in] float32, begin) -> the same rows with the adapter merged
MergedRows = Callable[[Tensor, int], Tensor]
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK_BYTES = 1 << 20


class MergedAdapter:
    """One adapter. Its files are read from beginning to end on a thread of its own, to see that they are what was
    verified; after that they are in the page cache, and reading single tensors of them does not wait for a disk.

    Call nothing but `is_ready` before that is over, and `close` at last. Raises OSError or EOFError where a file cannot
    be read, ValueError where it is another.
    """

    def __init__(self, files: Sequence[SourceFile], parts: Sequence[Part]) -> None:
        self._files = _Files(files)
        low_rank = [part for part in parts if isinstance(part, LowRank)]
        self._linears = {part.module: part for part in low_rank if not part.is_in_experts}
        self._in_experts = {part.module: part for part in low_rank if part.is_in_experts}
        self._replaced = {(it.layer, it.expert): it for it in parts if isinstance(it, ExpertReplacement)}
        assert len(low_rank) + len(self._replaced) == len(parts), "a part that nobody merges"

    def is_ready(self) -> bool:
        return self._files.are_read

    def close(self) -> None:
        self._files.close()

    @property
    def linears(self) -> Sequence[str]:
        """Those that it acts on, routers among them, by module name."""
        return tuple(self._linears)

    def linear(self, name: str) -> MergedRows:
        part = self._linears[name]
        magnitude = None if part.magnitude is None else self._files.read(part.magnitude)
        return _LowRankRows(self._files.read(part.a), self._files.read(part.b), part.scale, magnitude)

    def acts_on_experts(self, layer: int, name: str) -> bool:
        """Whether it has anything for the routed experts of a layer, which are the module of that name."""
        return any(at == layer for at, _ in self._replaced) or bool(self._low_rank_of(name))

    def experts(self, layer: int, name: str) -> "MergedExperts":
        replaced = {expert: part for (at, expert), part in self._replaced.items() if at == layer}
        return MergedExperts(self._files, replaced, self._low_rank_of(name))

    def _low_rank_of(self, name: str) -> dict[str, LowRank]:
        """By the matrix's own name."""
        split = ((module.rpartition("."), part) for module, part in self._in_experts.items())
        return {matrix: part for (experts, _, matrix), part in split if experts == name}


class MergedExperts:
    """The routed experts of one layer. Rows of gate and up are one matrix, in the order in which the base has them."""

    def __init__(self, files: "_Files", replaced: dict[int, ExpertReplacement], low_rank: dict[str, LowRank]) -> None:
        self._files, self._replaced = files, replaced
        held = {matrix: (files.read(it.a), files.read(it.b), it.scale) for matrix, it in low_rank.items()}
        self._low_rank = held  # [1 or M, rank, in], [1 or M, out, rank]

    def replaces(self, expert: int) -> bool:
        return expert in self._replaced

    def gate_up(self, expert: int) -> MergedRows:
        replaced = self._replaced.get(expert)
        if replaced is not None:  # there is nothing of the base's left that LoRA could act on
            return _instead(torch.cat([self._files.read(tensor) for tensor in replaced.gate_up]))
        rows: list[MergedRows] = []
        for matrix in ("gate_up_proj", "gate_proj", "up_proj"):
            if matrix in self._low_rank:
                a, b, scale = self._of(expert, matrix)
                nothing = torch.zeros_like(b)
                halves = {"gate_proj": [b, nothing], "up_proj": [nothing, b]}.get(matrix, [b])
                rows.append(_LowRankRows(a, torch.cat(halves), scale))
        return _one_after_another(rows)

    def down(self, expert: int) -> MergedRows:
        replaced = self._replaced.get(expert)
        if replaced is not None:
            return _instead(self._files.read(replaced.down))
        has_any = "down_proj" in self._low_rank
        return _one_after_another([_LowRankRows(*self._of(expert, "down_proj"))] if has_any else [])

    def _of(self, expert: int, matrix: str) -> tuple[Tensor, Tensor, float]:
        a, b, scale = self._low_rank[matrix]
        return a[expert if len(a) > 1 else 0], b[expert if len(b) > 1 else 0], scale


class _LowRankRows:
    """W + scale * b @ a, each row then scaled to its magnitude, if there are any."""

    def __init__(self, a: Tensor, b: Tensor, scale: float, magnitude: Tensor | None = None) -> None:
        self._a, self._b, self._scale, self._magnitude = a, b, scale, magnitude

    def __call__(self, base: Tensor, begin: int) -> Tensor:
        rows = slice(begin, begin + len(base))
        merged = base + self._scale * (self._b[rows].to(base.device) @ self._a.to(base.device))
        if self._magnitude is not None:
            merged *= (self._magnitude[rows].to(base.device) / torch.linalg.vector_norm(merged, dim=1))[:, None]
        return merged


def _instead(matrix: Tensor) -> MergedRows:
    return lambda base, begin: matrix[begin : begin + len(base)].to(base.device)


def _one_after_another(steps: Sequence[MergedRows]) -> MergedRows:
    def rows(base: Tensor, begin: int) -> Tensor:
        for step in steps:
            base = step(base, begin)
        return base

    return rows


class _Files:
    def __init__(self, files: Sequence[SourceFile]) -> None:
        self._files = files
        self._descriptors: dict[str, int] = {}
        self._over = threading.Event()
        self._error: Exception | None = None
        self._last: tuple[tuple[str, int], Tensor] | None = None  # many tensors may be cut from what lies at one offset
        threading.Thread(target=self._run, name="adapter-check", daemon=True).start()

    @property
    def are_read(self) -> bool:
        return self._over.is_set()

    def read(self, operand: Operand) -> Tensor:
        """[its shape] float32, on the host."""
        if self._error is not None:
            raise self._error
        out = torch.zeros(operand.shape)
        for piece in operand.pieces:
            out[_from(piece.start, piece.tensor.shape)] = self._tensor(piece.tensor) * piece.factor
        return out

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _run(self) -> None:
        try:
            for file in self._files:
                self._descriptors[file.file] = open_resolved(file.path)
                self._verify(file)
        except Exception as error:  # for whoever wants to read
            self._error = error
        finally:
            self._over.set()

    def _verify(self, file: SourceFile) -> None:
        descriptor, digest = self._descriptors[file.file], hashlib.sha256()
        if os.fstat(descriptor).st_size == file.size:
            for begin in range(0, file.size, _CHUNK_BYTES):
                raw = bytearray(min(_CHUNK_BYTES, file.size - begin))
                read_exactly(descriptor, begin, memoryview(raw))
                digest.update(raw)
        if digest.hexdigest() != file.sha256:
            raise ValueError(f"{clean(file.file, 200)} changed after it was registered; register the adapter again")

    def _tensor(self, it: TensorRef) -> Tensor:
        stored = self._stored(it)
        if it.cut_from is None:
            return stored.view(it.shape)
        whole = stored.view(it.cut_from.shape)
        if it.cut_from.order:
            whole = whole.permute(it.cut_from.order)
        return whole[_from(it.cut_from.start, it.shape)]

    def _stored(self, it: TensorRef) -> Tensor:
        """What lies at its offset, flat, in float32."""
        place = (it.file, it.offset)
        if self._last is None or self._last[0] != place:
            raw = bytearray(it.stored_elements * BYTES_PER_ELEMENT[it.dtype])
            read_exactly(self._descriptors[it.file], it.offset, memoryview(raw))
            self._last = place, torch.frombuffer(raw, dtype=_DTYPES[it.dtype]).float()
        return self._last[1]


def _from(start: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(at, at + size) for at, size in zip(start, shape, strict=True))
