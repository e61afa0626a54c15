"""The sections of the check: what each is for, how long it may take, and where its code is.

No torch here: the process that starts the sections must not open the device that one of them may leave unusable.
"""

from dataclasses import dataclass

OPS = ("step_rows", "expert_route", "expert_tiles", "grouped_gemm", "lora", "gated", "paged_attention", "store_kv",
       "latent_prep", "rope_store", "rms_norm", "rope", "sampling", "logprobs")  # fmt: skip
FAMILIES = ("llama", "gemma2", "gpt_oss", "qwen3_moe", "deepseek_v2", "deepseek_v3")


@dataclass(frozen=True)
class Section:
    """entry: "module:function"; the function takes a Bench and yields rows.

    parts: each runs in a process of its own, all at once: what is compiled by one processor core, or crashes, does not
    hold up the others. Sections that measure time have none.
    """

    name: str
    limit_s: int
    entry: str
    what: str
    parts: tuple[str, ...] = ()


SECTIONS = (
    Section("self-test", 60, "virtual_memory:self_test", "virtual memory: contents, counts, out of memory, copies"),
    Section("kernels", 300, "kernel_checks:correctness", "every kernel against its reference", OPS),
    Section("stress", 120, "stress:replays", "2,000 replays: outputs bitwise equal, counters zero",
            ("expert_route", "lora", "paged_attention", "rms_norm")),
    Section("memcheck", 300, "kernel_checks:memcheck", "a small case of each op under compute-sanitizer", OPS),
    Section("ceilings", 120, "ceilings:assumptions",
            "copy, matrix rate, GEMMs of both models, arena beside cudaMalloc, launch gap, LoRA's columns"),
    Section("ops", 240, "op_times:against_ceilings", "each kernel's time beside its floor"),
    Section("attention", 120, "other_attention:side_by_side", "our attention beside torch's and FlashInfer's"),
    Section("esft", 480, "models:esft", "DeepSeek-V2-Lite with 0, 1, 4 and 20 ESFT adapters"),
    Section("lora", 420, "models:lora", "Llama-3.1-8B with 0, 1, 8 and 32 LoRA adapters"),
    Section("swap", 180, "swap:under_load", "what decodes notice of adapters that load"),
    Section("oracle", 240, "oracle:families", "mixed batches against merged weights, by Transformers", FAMILIES),
)  # fmt: skip
BY_NAME = {section.name: section for section in SECTIONS}
