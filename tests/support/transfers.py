"""Transfers that a test runs on its own thread, from disk or by way of the host's cache."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path

import torch

from adapters_store.parts import SourceFile
from server.weights.arena import PageWork
from server.weights.chunks import HostChunks
from server.weights.host_cache import CachedFiles, HostCache
from server.weights.staging import Copier, HostCopy, PinnedCopy
from server.weights.tables.table import Derive, Place, Prepared
from server.weights.transfer import Transfer
from tests.support.cuda_fake_driver import FakeCuda

CPU = torch.device("cpu")
WAYS = [" ".join(it) for it in product(("host", "pinned"), ("disk", "cache"))]
CHUNK = 64


def stored(folder: Path, name: str, raw: bytes) -> SourceFile:
    """A file as it was verified."""
    path = folder / name
    path.write_bytes(raw)
    return SourceFile(name, str(path.resolve()), len(raw), hashlib.sha256(raw).hexdigest())


def cache(num_chunks: int = 512, chunk_bytes: int = CHUNK) -> HostCache:
    return HostCache(HostChunks(num_chunks * chunk_bytes, is_pinned=False, chunk_bytes=chunk_bytes))


def copier(kind: str) -> Copier:
    if kind == "host":
        return HostCopy()
    buffers = [torch.zeros(128, dtype=torch.uint8) for _ in range(2)]
    return PinnedCopy(buffers, torch.zeros(128, dtype=torch.uint8), CPU, FakeCuda())


def transfer(
    files: Sequence[SourceFile],
    places: Iterable[Place],
    way: str = "host disk",
    prepared: Callable[[Prepared], Prepared] = lambda it: it,
    derive: Sequence[Derive] = (),
    work: PageWork | None = None,
    cached: CachedFiles | None = None,
) -> Transfer:
    kind, _, source = way.partition(" ")
    if source == "cache":
        cached = cache().reserve("r", files)
        assert cached is not None
    ready = prepared(Prepared(list(places), derive=derive))
    return Transfer(files, [lambda: ready], work or PageWork(), copier(kind).begin(), cached)


def run(it: Transfer) -> Transfer:
    it.map_pages()
    it.run()
    assert it.done
    return it
