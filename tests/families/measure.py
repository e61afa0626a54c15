"""One tiny model through the engine: alone, and beside adapters on everything that adapters may act on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from adapters_store.rules import Adapter
from server.model.probe import PROBE
from tests.families.adapters import expert_lora, lora_everywhere, tuned_experts
from tests.families.mechanisms import Mechanisms, mechanisms_of
from tests.support.engine_harness import Engine, prompts
from tests.support.tiny_adapters import merge, register
from tests.support.tiny_models import MODELS, NEW_TOKENS, make_model, reference

KINDS = ("lora", "expert lora", "esft")


@dataclass(frozen=True)
class Measured:
    """Of one entry of MODELS. exact: of five prompts, how many came out as by Transformers, for the base and for each
    kind of adapter that the family takes; an adapter's are only counted where it changed the answer. refused: why, for
    a kind that it does not take. targets: linears that adapters may act on."""

    name: str
    model_type: str
    exact: dict[str, int]
    mechanisms: Mechanisms
    targets: int
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def is_exact(self) -> bool:
        return all(count == len(prompts()) for count in self.exact.values())


def greedy(model: nn.Module, asked: Sequence[list[int]]) -> list[list[int]]:
    return [reference(model, prompt, NEW_TOKENS) for prompt in asked]


def arrive_in_turn(engine: Engine) -> list[list[int]]:
    """Tokens of five prompts that come one after another, so that every kind of step occurs."""
    arriving, asked = iter(prompts()), []

    def arrive(step: int) -> None:
        if step % 2 == 0 and (prompt := next(arriving, None)) is not None:
            asked.append(engine.add(prompt, NEW_TOKENS))

    engine.run(between=arrive)
    return [answer.tokens for answer in asked]


def measure(name: str, root: Path) -> Measured:
    """All adapters and the base in one batch, after the base alone."""
    stock = make_model(name)
    base = greedy(stock, prompts())
    served: Any = make_model(name, attention=PROBE)
    engine = Engine(served)
    exact = {"base": _equal(arrive_in_turn(engine), base)}
    spec = engine.assembly.info.base
    made = {"lora": lora_everywhere(root / "lora", spec, stock)}
    refused = {}
    if spec.experts:
        made["expert lora"] = expert_lora(root / "expert-lora", spec)
        if all(stack.is_plain for stack in spec.experts.values()):
            made["esft"] = tuned_experts(root / "esft", spec, stock)
        else:
            refused["esft"] = "experts of another layout than ESFT's"
    entries = {kind: register(engine, path) for kind, path in made.items()}
    answers = {kind: [engine.add(prompt, NEW_TOKENS, entry.ref) for prompt in prompts()]
               for kind, entry in entries.items()}  # fmt: skip
    again = [engine.add(prompt, NEW_TOKENS) for prompt in prompts()]
    engine.run()
    exact["base"] = min(exact["base"], _equal([answer.tokens for answer in again], base))
    for kind, entry in entries.items():
        merged = greedy(_merged(name, entry), prompts())
        assert merged != base, f"{name}: {kind} makes no difference"
        exact[kind] = _equal([answer.tokens for answer in answers[kind]], merged)
    return Measured(name, MODELS[name][0], exact, mechanisms_of(engine, served), len(spec.linears), refused)


def _merged(name: str, entry: Adapter) -> nn.Module:
    """A LoRA of a head that is tied to the embedding acts on the head alone."""
    model: Any = make_model(name)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
    return merge(model, entry)


def _equal(found: list[list[int]], expected: list[list[int]]) -> int:
    return sum(one == other for one, other in zip(found, expected, strict=True))
