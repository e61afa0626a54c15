"""Building and keeping the host's kernels where things are not as they should be.

With a library of one small source, so that a build is quick; `test_library.py` has the real one.
"""

import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from kernels import host
from kernels.host import build, kept, prebuilt
from tests.support.waiting import eventually

SOURCE = (
    '#include <omp.h>\nextern "C" int answer() { return 40 + omp_get_max_threads() / omp_get_max_threads() * 2; }\n'
)

pytestmark = [
    pytest.mark.skipif(not shutil.which("c++"), reason="nothing to compile with"),
    pytest.mark.usefixtures("small"),
]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Sources and a cache of the test's own; returns where libraries are kept."""
    source = tmp_path / "sources" / "tiny" / "host.cpp"
    source.parent.mkdir(parents=True)
    source.write_text(SOURCE)
    monkeypatch.setattr(build, "_ROOT", tmp_path / "sources")
    monkeypatch.setattr(prebuilt, "DIRECTORY", tmp_path / "prebuilt")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    build.version.cache_clear()
    host._share_openmp()
    return tmp_path / "cache" / "heddle" / "kernels"


def answer() -> int:
    return int(host._built_here().library.answer())


def why_not() -> str:
    with pytest.raises(build.CannotBuild) as refused:
        host._built_here()
    return str(refused.value)


def a_compiler(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """CXX, and no other compiler."""

    def choose(command: str) -> None:
        monkeypatch.setenv("CXX", command)
        monkeypatch.setattr(build, "_COMPILERS", ())

    return choose


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """An entry for each time that something is compiled."""
    counted: list[object] = []
    compiled = build.compiled

    def counting(*args: object) -> bytes:
        counted.append(args)
        return compiled(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(build, "compiled", counting)
    return counted


# -- what is kept ---


def test_it_is_built_once(small: Path, builds: list[object]) -> None:
    assert answer() == answer() == 42
    assert len(builds) == 1 and len(list(small.iterdir())) == 1
    assert small.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("size", [0, 10, 33, 5000, -1])
def test_what_was_cut_off_is_built_again(small: Path, builds: list[object], size: int) -> None:
    """The loader would map it, and the process die of SIGBUS, at every start."""
    answer()
    (library,) = small.iterdir()
    whole = library.read_bytes()
    library.unlink()  # it is mapped
    library.write_bytes(whole[:size])
    library.chmod(0o700)
    assert answer() == 42 and len(builds) == 2
    assert library.read_bytes()[-32:] == whole[-32:]


def test_other_sources_are_another_library(small: Path, builds: list[object], tmp_path: Path) -> None:
    answer()
    (tmp_path / "sources" / "tiny" / "host.cpp").write_text(SOURCE.replace("40", "50"))
    assert answer() == 52 and len(builds) == 2 and len(list(small.iterdir())) == 2


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_library_where_others_may_write_is_not_run(small: Path, mode: int, builds: list[object]) -> None:
    answer()
    small.chmod(mode)
    before = [it.stat().st_mtime_ns for it in small.iterdir()]
    assert answer() == 42 and len(builds) == 2
    assert [it.stat().st_mtime_ns for it in small.iterdir()] == before
    small.chmod(0o700)
    (library,) = small.iterdir()
    library.chmod(0o777)
    assert answer() == 42 and len(builds) == 3


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_a_library_of_somebody_else_is_not_run(small: Path, builds: list[object]) -> None:
    answer()
    (library,) = small.iterdir()
    os.chown(library, 12345, 12345)
    assert answer() == 42 and len(builds) == 2
    os.chown(small, 12345, 12345)
    assert answer() == 42 and len(builds) == 3


@pytest.mark.parametrize("place", ["/proc/heddle", "/dev/full/heddle", "relative", ""])
def test_without_a_home_it_is_built_for_the_process(
    place: str, builds: list[object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", place)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # of a user that has none
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert answer() == answer() == 42 and len(builds) == 2
    assert sorted(it.name for it in tmp_path.iterdir()) == ["sources"]  # nothing is left, nor in a folder called ~


def test_where_nothing_can_be_written_or_executed(monkeypatch: pytest.MonkeyPatch, builds: list[object]) -> None:
    """No room, a file system without execution: the loader refuses what was kept."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept, "keep", full)
    assert answer() == 42
    monkeypatch.undo()


def test_what_cannot_be_executed_where_it_is_kept_is_loaded_elsewhere(
    small: Path, builds: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = host.CDLL

    def noexec(path: str, *mode: int) -> object:
        if path.startswith(str(small)):
            raise OSError("failed to map segment from shared object")
        return load(path, *mode)

    monkeypatch.setattr(host, "CDLL", noexec)
    assert answer() == answer() == 42 and len(builds) == 1


def test_a_library_for_another_system_is_built_again(small: Path, builds: list[object]) -> None:
    """Whole, and of the right name, and no library that this system loads."""
    (compiler,) = list(build.compilers())[:1]
    small.mkdir(parents=True, mode=0o700)
    kept.keep(b"not ELF", small / f"{build.of_sources()}-{build.of_machine(compiler)}.so")
    assert answer() == 42 and len(builds) == 1


def test_what_nobody_uses_is_removed(small: Path) -> None:
    answer()
    (library,) = small.iterdir()
    for name, age in (("old.so", 91 * 86400), ("new.so", 80 * 86400), (".writing-1", 7200), (".writing-2", 60)):
        (small / name).write_text("x")
        os.utime(small / name, (time.time() - age,) * 2)
    os.utime(library, (time.time() - 91 * 86400,) * 2)
    assert answer() == 42  # in use again
    kept.keep(b"x", small / "other.so")
    assert {it.name for it in small.iterdir()} == {library.name, "new.so", ".writing-2", "other.so"}


def _build_in_a_process(results: "multiprocessing.Queue[int]") -> None:
    results.put(answer())


def test_processes_may_build_at_once(small: Path) -> None:
    forked = multiprocessing.get_context("fork")
    results = forked.Queue()
    processes = [forked.Process(target=_build_in_a_process, args=(results,)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [42] * 4
    for process in processes:
        process.join()
    assert len(list(small.iterdir())) == 1


def test_killed_while_it_builds(small: Path, tmp_path: Path, only: Callable[[str], None]) -> None:
    """Nothing of it is taken for a library."""
    only(
        a_compiler(
            tmp_path / "slow", f'case "$*" in *version*) echo slow 1;; *) touch {tmp_path}/began; sleep 60;; esac'
        )
    )
    forked = multiprocessing.get_context("fork")
    process = forked.Process(target=_build_in_a_process, args=(forked.Queue(),))
    process.start()
    eventually((tmp_path / "began").exists)
    process.kill()
    process.join()
    assert list(small.iterdir()) == []
    only("c++")
    assert answer() == 42


# -- compilers ---


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_COMPILERS", ("heddle-has-no-such-compiler",))
    assert "install one" in why_not()


@pytest.mark.parametrize(("script", "wanted"), [
    ("exit 1", "is CXX what it should be"),
    ("exit 0", "is CXX what it should be"),
    ('case "$*" in *version*) echo old 1;; *) echo "host.cpp:1: error: no thing" >&2; exit 1;; esac', "no thing"),
    ('case "$*" in *version*) echo killed 1;; *) kill -9 $$;; esac', "does not compile"),
    ('case "$*" in *version*) echo lies 1;; esac', "No such file"),
    ('case "$*" in *version*) echo junk 1;; *) for it in "$@"; do out=$it; done; echo junk > "$out";; esac',
     "cannot be loaded"),
])  # fmt: skip
def test_compilers_that_fail(script: str, wanted: str, tmp_path: Path, only: Callable[[str], None],
                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    failing = a_compiler(tmp_path / "failing", script)
    only(failing)
    assert wanted in why_not()
    monkeypatch.setattr(build, "_COMPILERS", ("c++",))
    assert answer() == 42  # another one does


@pytest.mark.parametrize("hangs", ["--version", "a source"])
def test_a_compiler_that_hangs_is_ended_with_what_it_started(
    hangs: str, tmp_path: Path, only: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_TIMEOUT_S", 0.5)
    monkeypatch.setattr(build, "_VERSION_TIMEOUT_S", 0.5)
    told = "sleep 100 & echo $! > {0}; wait" if hangs == "--version" else "echo hanging 1"
    rest = f"sleep 100 & echo $! > {tmp_path}/child; wait"
    script = f'case "$*" in *version*) {told.format(tmp_path / "child")};; *) {rest};; esac'
    only(a_compiler(tmp_path / "hanging", script))
    assert "timed out" in why_not()
    child = int((tmp_path / "child").read_text())
    eventually(lambda: not is_running(child))


def is_running(process: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


@pytest.mark.parametrize(
    "command", ["c++ -DSOMETHING", "no-such-compiler -O0", "'", "   ", "/", "c++ '-DTEXT=\"two words\"'"]
)
def test_cxx_may_have_arguments_or_be_nonsense(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", command)
    assert answer() == 42


# -- what a wheel brings ---


def test_a_wheel_s_library_is_for_machines_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(build.VARIANTS, os.uname().machine, (
        build.Variant("too new", (), frozenset({"not yet invented"})), build.Variant("any", (), frozenset()),
    ))  # fmt: skip
    (first,) = list(build.compilers())[:1]
    prebuilt.DIRECTORY.mkdir()
    for variant in build.VARIANTS[os.uname().machine]:
        (prebuilt.DIRECTORY / variant.file_name()).write_bytes(build.compiled(first, (), build.PORTABLE))
    load = host._loaded.__wrapped__
    assert load().told.startswith("built with")
    monkeypatch.setattr(build, "_COMPILERS", ())
    found = load()
    assert found.told == "brought by the wheel, for any" and found.library.answer() == 42
    (build._ROOT / "tiny" / "host.cpp").write_text(SOURCE + "\n")
    assert "install one" in load()  # it was made from other sources


def test_kinds_of_processors_are_by_their_instruction_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    prebuilt.DIRECTORY.mkdir()
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "", "", "", "x86_64")))
    v4, v3 = build.VARIANTS["x86_64"]
    for variant in (v4, v3):
        (prebuilt.DIRECTORY / variant.file_name()).touch()
    for flags, wanted in ((v4.needs, v4), (v3.needs | {"avx512f"}, v3), (v4.needs - {"avx2"}, None), (set(), None)):
        monkeypatch.setattr(build, "processor", lambda flags=flags: ("", " ".join(flags)))
        found = prebuilt.best()
        assert (found and found[0]) == (wanted and wanted.name)
