"""Transformers' generate on one left-padded batch; adapters by PEFT, several of them by its `adapter_names`."""

from typing import ClassVar

from benchmarks.peers.environments import PROGRAMS, python_of
from benchmarks.peers.systems.system import ProgramSystem, Served


class TransformersGenerate(ProgramSystem):
    name = "transformers"
    can: ClassVar = frozenset({"base", "one", "mixed", "many", "moe"})
    settings = "float32, one batch of all requests, left-padded; base without PEFT's wrappers"

    def prepare(self, served: Served) -> None:
        self._python = python_of("transformers_generate", self.rooms)

    def _start(self, served: Served) -> None:
        adapters = {it: str(served.directory / "adapters" / it) for it in served.adapters}
        self._serve_program(self._python, PROGRAMS / "transformers_generate.py", served, adapters=adapters)
