"""What adapters are held to, as a job of verification has it."""

from pathlib import Path

from adapters_store.room import Room
from adapters_store.rules import Rules
from adapters_store.store.blobs import Blobs
from tests.support.adapter_files import BASE, lora


def test_a_job_carries_what_verification_needs(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    room = Room(1, 2, 3)
    job = Rules(BASE, (tmp_path / "link", tmp_path), room).job("a/b", ["key"])
    real = str(tmp_path.resolve())
    assert (job.path, job.roots, job.base, job.room) == ("a/b", (f"{real}/real", real), BASE, room)
    assert job.ignore_keys == ("key",) and job.desk is None and job.stored == ()


def test_a_job_knows_where_files_are_copied_to(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    blobs.prepare()
    with blobs.desk() as desk:
        job = Rules(BASE, (tmp_path,)).job_below(("/elsewhere",), "a", desk=desk)
        assert job.desk == desk.paths and job.roots == ("/elsewhere",)


def test_reading_serves_an_adapter_from_where_it_lies(tmp_path: Path) -> None:
    directory = lora(tmp_path / "a")
    read = Rules(BASE, (tmp_path,)).read("name", "a")
    assert (read.ref.name, read.ref.kind, read.ref.revision) == ("name", "lora", read.package.revision)
    assert read.root == "a" and Path(read.package.files[0].path).parent == directory.resolve()
