"""Where the compiled library is kept: in the user's cache. It is code that we run, so nobody else may write there."""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_DIGEST = 32  # bytes of SHA-256 behind the library: a loader maps what is cut off, and dies when it gets there
_UNUSED_S = 90 * 24 * 3600.0
_ABANDONED_S = 3600.0
_WRITING = ".writing-"


def home() -> Path | None:
    """Heddle's place in the user's cache, which need not exist. None for a user without a home."""
    cached = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cached):
        cached = os.path.expanduser("~/.cache")  # stays as it is for a user without a home
    return Path(cached) / "heddle" if os.path.isabs(cached) else None


def directory() -> Path | None:
    """None where there is none that is the user's own (or root's)."""
    ours = home()
    if ours is None:
        return None
    kept = ours / "kernels"
    with suppress(OSError):
        kept.mkdir(mode=0o700, parents=True, exist_ok=True)
    return kept if kept.is_dir() and _is_ours(kept) and _is_ours(ours) else None


def _is_ours(path: Path) -> bool:
    try:
        found = path.stat()
    except OSError:
        return False
    return found.st_uid in (0, os.getuid()) and not found.st_mode & 0o022


def read(library: Path) -> bytes | None:
    """What `keep` wrote there, if it is whole and nobody else's."""
    try:
        content = library.read_bytes() if _is_ours(library) else b""
    except OSError:
        return None
    code, digest = content[:-_DIGEST], content[-_DIGEST:]
    if not code or hashlib.sha256(code).digest() != digest:
        return None
    with suppress(OSError):
        os.utime(library)  # it is in use
    return code


def keep(code: bytes, library: Path) -> None:
    """Several processes may do so at once: the last one's stays. Also removes what nobody has used for long."""
    with suppress(OSError):
        _tidy(library.parent)
    descriptor, writing = tempfile.mkstemp(dir=library.parent, prefix=_WRITING)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(code + hashlib.sha256(code).digest())
        os.chmod(writing, 0o700)
        os.replace(writing, library)
    except OSError:
        Path(writing).unlink(missing_ok=True)
        raise


def _tidy(kept: Path) -> None:
    now = time.time()
    for file in kept.iterdir():
        limit = _ABANDONED_S if file.name.startswith(_WRITING) else _UNUSED_S
        if file.is_file() and now - file.stat().st_mtime > limit:
            file.unlink(missing_ok=True)


@contextmanager
def for_now() -> Iterator[Path]:
    """A place that is removed again: what is loaded stays loaded."""
    place = tempfile.mkdtemp(prefix="heddle-kernels-")
    try:
        yield Path(place)
    finally:
        shutil.rmtree(place, ignore_errors=True)
