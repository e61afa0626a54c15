"""The suite's cases, from the archive that carries them."""

import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_CARRIER = "jsonschema==4.26.0"
_FILE = re.compile(r".*/json/tests/(?P<draft>draft2020-12|draft7)/(?P<name>.+)\.json")
_DIALECTS = {
    "draft2020-12": "https://json-schema.org/draft/2020-12/schema",
    "draft7": "http://json-schema.org/draft-07/schema#",
}


class Instance(NamedTuple):
    value: Any
    is_valid: bool
    about: str


class Case(NamedTuple):
    """`name`: of its file, such as `enum` or `optional/format/date`."""

    draft: str
    name: str
    about: str
    schema: Any
    instances: list[Instance]


def fetch(folder: Path) -> Path:
    """The archive, from the package registry."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "jsonschema",
               "--dest", str(folder), _CARRIER]  # fmt: skip
    subprocess.run(command, check=True)
    (archive,) = folder.glob("jsonschema-*.tar.gz")
    return archive


def read(archive: Path) -> Iterator[Case]:
    with tarfile.open(archive) as files:
        for member in sorted(files.getmembers(), key=lambda it: it.name):
            match = _FILE.fullmatch(member.name)
            content = files.extractfile(member) if match is not None else None
            if match is None or content is None:
                continue
            for it in json.load(content):
                instances = [Instance(test["data"], test["valid"], test["description"]) for test in it["tests"]]
                schema = it["schema"]
                if isinstance(schema, dict):  # what has no $schema is of the draft that its folder names
                    schema = {"$schema": _DIALECTS[match["draft"]], **schema}
                yield Case(match["draft"], match["name"], it["description"], schema, instances)
