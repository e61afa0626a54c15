"""OpenVINO GenAI's continuous batching, in a program of its own. It does not mix adapters in a batch: what it is asked
for several is done adapter by adapter, which only a batch that is known beforehand allows."""

import json
import subprocess
from pathlib import Path
from typing import ClassVar

from benchmarks.peers.environments import PROGRAMS, python_of
from benchmarks.peers.systems.system import DidNotStart, ProgramSystem, Served

_PROGRAM = PROGRAMS / "openvino_genai.py"


class OpenVino(ProgramSystem):
    name = "openvino"
    can: ClassVar = frozenset({"base", "one", "grouped"})
    settings = "inference precision and KV cache float32; several adapters: one generate call an adapter, in turn"

    def prepare(self, served: Served) -> None:
        self._python = python_of("openvino_genai", self.rooms)
        target = served.directory / "openvino"
        command = [str(self._python), "-P", str(_PROGRAM), str(served.directory / "base"), str(target)]
        if not target.exists():
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
            if done.returncode:
                raise DidNotStart(f"not converted: {done.stderr.strip()[-300:]}")

    def _start(self, served: Served) -> None:
        adapters = {it: _adapter(served.directory / "adapters" / it) for it in served.adapters}
        self._serve_program(self._python, _PROGRAM, served, adapters=adapters,
                            converted=str(served.directory / "openvino"), max_running=served.max_running)  # fmt: skip


def _adapter(folder: Path) -> tuple[str, float]:
    """Its weights, and what scales them, which OpenVINO does not read from PEFT's configuration."""
    told = json.loads((folder / "adapter_config.json").read_text())
    return str(folder / "adapter_model.safetensors"), told["lora_alpha"] / told["r"]
