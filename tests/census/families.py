"""The tiny bases of the census, and what their modules are called."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tests.support.tiny_models import make_model

QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """`tiny` is its name among the tiny models. `mlp`: what Transformers 4 called the linears of an MLP or an expert.

    `v4_block`: what it called the block that holds router and experts."""

    name: str
    tiny: str
    attention: tuple[str, ...] = QKVO
    mlp: tuple[str, ...] = MLP
    router: str | None = None
    v4_block: str = "mlp"
    sizes: dict[str, Any] = field(default_factory=dict)

    @property
    def is_mixture(self) -> bool:
        return self.router is not None

    @property
    def is_transposed(self) -> bool:
        """Experts as [E, in, out] with gate and up in turns, not as [E, out, in] with gate before up."""
        return self.name == "gpt_oss"

    def model(self, attention: str = "eager", **sizes: Any) -> nn.Module:
        return make_model(self.tiny, attention, **{**self.sizes, **sizes})


_ALL = (
    Family("llama", "llama"),
    Family("qwen2", "qwen2"),
    Family("qwen3", "qwen3"),
    Family("gemma2", "gemma2", sizes={"tie_word_embeddings": True}),
    Family("phi3", "phi3", ("qkv_proj", "o_proj"), ("gate_up_proj", "down_proj")),
    Family("mixtral", "mixtral-window", QKVO, ("w1", "w3", "w2"), "gate", "block_sparse_moe"),
    Family("qwen2_moe", "qwen2_moe", router="gate"),
    Family("qwen3_moe", "qwen3_moe", router="gate"),
    Family("olmoe", "olmoe", router="gate"),
    Family("deepseek_v2", "deepseek_v2", ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"), router="gate"),
    Family("deepseek_v3", "deepseek_v3", ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
           router="gate"),
    Family("gpt_oss", "gpt_oss", router="router"),
)  # fmt: skip
FAMILIES = {family.name: family for family in _ALL}

EVERY = tuple(FAMILIES)
TEN = tuple(name for name in EVERY if not name.startswith("qwen2"))
DENSE = tuple(name for name, family in FAMILIES.items() if not family.is_mixture)
MIXTURES = tuple(name for name, family in FAMILIES.items() if family.is_mixture)
GATED = tuple(name for name in MIXTURES if not FAMILIES[name].is_transposed)  # Transformers 4 had an nn.Linear each
DEEPSEEK = ("deepseek_v2", "deepseek_v3")


def parents(model: nn.Module, name: str) -> list[str]:
    """Modules, by full name, that hold a module of this name, without the shared experts'."""
    found = [full.rpartition(".")[0] for full, _ in model.named_modules() if full.rpartition(".")[2] == name]
    return [parent for parent in found if "shared" not in parent]


def expert_modules(model: nn.Module) -> dict[int, str]:
    """The module of the routed experts, by layer."""
    return {int(parent.split(".")[2]): f"{parent}.experts" for parent in parents(model, "experts")}
