"""llama.cpp's server, compiled from the sources in llama-cpp-python's sdist, over the model converted to GGUF."""

import subprocess
from typing import Any, ClassVar

from benchmarks.peers.environments import PROGRAMS, llama_cpp, python_of
from benchmarks.peers.systems.system import DidNotStart, HttpSystem, Served
from benchmarks.workload import Job


class LlamaCpp(HttpSystem):
    name = "llama.cpp"
    can: ClassVar = frozenset({"base", "one", "mixed", "online", "http"})
    settings = (
        "float32 weights and KV cache, no flash attention, which is not float32's; --parallel for all requests, "
        "adapters by the request's `lora`"
    )

    def prepare(self, served: Served) -> None:
        self._server, sources = llama_cpp(self.rooms)
        python = python_of("llama_cpp", self.rooms)
        archive = next(sources.parent.glob("llama_cpp_python-*.tar.gz"))
        self.versions = {"the llama.cpp in llama-cpp-python": archive.name.split("-")[1].removesuffix(".tar.gz")}
        self._base = served.directory / "base.gguf"
        self._adapters = {it: served.directory / "adapters-gguf" / f"{it}.gguf" for it in served.adapters}
        missing = [name for name, path in self._adapters.items() if not path.exists()]
        if self._base.exists() and not missing:
            return
        done = subprocess.run([str(python), "-P", str(PROGRAMS / "llama_cpp.py"), str(sources), str(served.directory),
                               *missing], capture_output=True, text=True)  # fmt: skip
        if done.returncode:
            raise DidNotStart(f"not converted to GGUF: {done.stderr.strip()[-300:]}")

    def _start(self, served: Served) -> None:
        adapters = ["--lora-init-without-apply"] if served.adapters else []
        for path in self._adapters.values():
            adapters += ["--lora", str(path)]
        self._ids = {name: index for index, name in enumerate(self._adapters)}
        self._caches = served.prefix_cache
        # every slot has its share of the context
        command = [str(self._server), "-m", str(self._base), "--host", "127.0.0.1", "--port", "{port}", "--parallel",
                   str(served.max_running), "--ctx-size", str(served.max_running * served.context), "--threads",
                   str(served.threads), "--threads-batch", str(served.threads), "--cache-type-k", "f32",
                   "--cache-type-v", "f32", "--flash-attn", "off", "--no-webui", *adapters]  # fmt: skip
        self._serve(command, served)

    def body(self, job: Job, new_tokens: int) -> dict[str, Any]:
        lora = [{"id": index, "scale": float(name == job.adapter)} for name, index in self._ids.items()]
        return super().body(job, new_tokens) | {"ignore_eos": True, "cache_prompt": self._caches,
                                                **({"lora": lora} if lora else {})}  # fmt: skip
