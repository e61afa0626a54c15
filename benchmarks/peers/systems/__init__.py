"""The systems that are compared, one file each; `create` makes the one of a name."""

from pathlib import Path

from benchmarks.peers.systems.heddle import HeddleSystem
from benchmarks.peers.systems.llama_cpp import LlamaCpp
from benchmarks.peers.systems.openvino import OpenVino
from benchmarks.peers.systems.system import System
from benchmarks.peers.systems.transformers import TransformersGenerate
from benchmarks.peers.systems.vllm import Vllm, VllmWithoutLora

SYSTEMS: dict[str, type[System]] = {
    it.name: it for it in (HeddleSystem, VllmWithoutLora, Vllm, OpenVino, TransformersGenerate, LlamaCpp)
}  # fmt: skip
# what --peers calls them
PEERS = {"heddle": ("heddle",), "vllm": ("vllm-off", "vllm"), "openvino": ("openvino",),
         "transformers": ("transformers",), "llama.cpp": ("llama.cpp",)}  # fmt: skip


def create(name: str, rooms: Path) -> System:
    return SYSTEMS[name](rooms)
