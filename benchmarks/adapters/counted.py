"""The experts' table of the server over pages that are only counted, so that it can be asked at any size: which pages
would be mapped for a model of 30 GB and adapters of 60 GB, on a machine with neither."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adapters_store.parts import ExpertReplacement, TensorRef
from benchmarks.adapters.layouts import Counts, Shape, base_bytes
from server.weights.arena import VirtualArena, VirtualArenas
from server.weights.host_arena import HostPages
from server.weights.page_pool import PagePool, own_pool
from server.weights.tables.experts import ExpertTable

_DTYPES = {2: torch.bfloat16, 4: torch.float32}
_NAMES = {2: "BF16", 4: "F32"}


class Measured(NamedTuple):
    """Bytes of pages. `counted`: by the account of the table; `mapped`: that the device was told to map."""

    base: int
    counted: int
    mapped: int
    after: int  # mapped for adapters once all of them have gone


class _CountedPages(HostPages):
    """Addresses are the host's, which cost nothing; no page is ever there."""

    def __init__(self, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self.mapped = 0  # bytes

    def map(self, address: int, num_bytes: int) -> None:
        self.mapped += num_bytes

    def unmap(self, address: int, num_bytes: int) -> None:
        self.mapped -= num_bytes

    def fence(self) -> Callable[[], None]:
        return lambda: None


class _CountedArena(VirtualArena):
    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")


class _CountedArenas(VirtualArenas):
    def stack(self, num_bytes: int, base_bytes: int, pool: PagePool) -> VirtualArena:
        return _CountedArena(num_bytes, self._pages, self._do)


def measure(shape: Shape, tuned: Sequence[Counts], page_bytes: int) -> Measured:
    """Map the base's experts and all adapters as the server would, in slots one behind the other."""
    pages = _CountedPages(page_bytes)
    pool = own_pool(1 << 50, page_bytes)
    table = ExpertTable(len(tuned), max(map(max, tuned)), pool, _CountedArenas(pages))
    dtype = _DTYPES[shape.itemsize]
    for layer in range(shape.moe_layers):
        gate_up = torch.empty(shape.experts, 2 * shape.inner, shape.hidden, dtype=dtype, device="meta")
        down = torch.empty(shape.experts, shape.hidden, shape.inner, dtype=dtype, device="meta")
        table.add_layer(layer, gate_up, down)
    of_base = pages.mapped
    for slot, counts in enumerate(tuned, 1):
        table.map(slot, table.layout(_parts(shape, counts)))
    counted, mapped = pool.num_used * page_bytes, pages.mapped - of_base
    for slot in range(1, len(tuned) + 1):
        table.unmap(slot)
    assert of_base >= base_bytes(shape)
    return Measured(of_base, counted, mapped, pages.mapped - of_base)


def _parts(shape: Shape, counts: Counts) -> list[ExpertReplacement]:
    """Which experts they are is of no consequence for room."""
    half = TensorRef("", "", (shape.inner, shape.hidden), _NAMES[shape.itemsize])
    down = TensorRef("", "", (shape.hidden, shape.inner), _NAMES[shape.itemsize])
    return [ExpertReplacement(layer, expert, (half, half), down)
            for layer, count in enumerate(counts) for expert in range(count)]  # fmt: skip
