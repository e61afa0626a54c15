"""One cell: make the adapter, offer it to verification, serve it in a mixed batch, compare with what is right.

exact          accepted, and greedy tokens are the truth's, which differ from the base's
refused        not accepted; the message is kept
WRONG          accepted, and some tokens are not the truth's, or a neighbour's in the batch are not the base's; or
               accepted where only a refusal is right
failed         accepted, and then the engine raised, or answered with an error
vacuous        as exact, but the truth is the base's own tokens: nothing is shown
unjudged       accepted, but PEFT does not load it, so that there is no truth
PEFT cannot    PEFT does not make it
n/a            the family has nothing of the kind
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from adapters_store.errors import AdapterError
from adapters_store.rules import Adapter, Rules
from server.engine.request import FinishReason
from server.model.probe import PROBE
from tests.census import by_peft
from tests.census.families import Family
from tests.census.made import Deltas, Made, MakeBase, PeftCannot, Row, peft_may_refuse
from tests.support.engine_harness import Engine, prompts
from tests.support.tiny_models import NEW_TOKENS, reference

Tokens = list[list[int]]  # of each prompt
RESULTS = ("exact", "refused", "WRONG", "failed", "vacuous", "unjudged", "PEFT cannot", "n/a")


@dataclass(frozen=True)
class Cell:
    section: str
    row: str
    family: str
    result: str
    message: str = ""


class Failed(Exception):
    """The engine took the adapter and then could not serve it."""


class Bench:
    """Measures the cells of one family; `root` is its directory. Truths are computed once for a directory."""

    def __init__(self, family: Family, root: Path) -> None:
        self._family, self._root = family, root
        self._truths: dict[Path, Tokens] = {}
        self._base: Tokens | None = None
        root.mkdir(parents=True)

    def measure(self, section: str, number: int, row: Row) -> Cell:
        if self._family.name not in row.families:
            return Cell(section, row.name, self._family.name, "n/a")
        result, message = self._result(row, self._root / f"{section}-{number}")
        return Cell(section, row.name, self._family.name, result, message)

    def _result(self, row: Row, directory: Path) -> tuple[str, str]:
        try:
            made = row.make(self._family, directory)
        except PeftCannot as error:
            return "PEFT cannot", str(error)
        engine = Engine((made.base or self._family.model)(PROBE))
        try:
            entry = read(engine, made)
        except AdapterError as error:
            return "refused", str(error)
        if made.truth is None:
            return "WRONG", "accepted; only a refusal is right"
        try:
            served, beside = serve(engine, entry)
        except Exception as error:  # an AssertionError of the engine's is a result here
            return "failed", f"{type(error).__name__}: {error}"
        try:
            truth = self.truth(made)
        except PeftCannot as error:
            return "unjudged", str(error)
        base = self._base_tokens(made.base)
        if served != truth or beside != base:
            return "WRONG", _difference(served, truth, beside, base)
        return ("vacuous", "") if truth == base else ("exact", "")

    def truth(self, made: Made) -> Tokens:
        """Raises PeftCannot."""
        assert made.truth is not None
        base = (made.trained_on or made.base or self._family.model)("eager")
        if not isinstance(made.truth, Path):
            return answers(merged(base, made.truth))
        if made.truth not in self._truths:
            with peft_may_refuse():
                self._truths[made.truth] = answers(by_peft.load(base, made.truth))
        return self._truths[made.truth]

    def _base_tokens(self, other: MakeBase | None) -> Tokens:
        if other is not None:
            return answers(other("eager"))
        if self._base is None:
            self._base = answers(self._family.model())
        return self._base


def read(engine: Engine, made: Made) -> Adapter:
    """Verification, as at a server's door."""
    rules = Rules(engine.assembly.info.base, (made.path.parent,))
    return rules.read("adapter", str(made.path), made.ignore_keys)


def serve(engine: Engine, entry: Adapter) -> tuple[Tokens, Tokens]:
    """Tokens with the adapter, and of the base's requests in the same batch."""
    engine.register(entry.ref, entry.package)
    asked = [[engine.add(prompt, NEW_TOKENS, ref) for prompt in prompts()] for ref in (entry.ref, None)]
    engine.run()
    for request in (*asked[0], *asked[1]):
        if request.finish is not FinishReason.LENGTH:
            raise Failed(f"a request ended with {request.finish}: {request.error}")
    return [request.tokens for request in asked[0]], [request.tokens for request in asked[1]]


@torch.no_grad()
def merged(base: nn.Module, deltas: Deltas) -> nn.Module:
    parameters = dict(base.named_parameters())
    for name, delta in deltas.items():
        parameters[name] += delta
    return base


def answers(model: nn.Module) -> Tokens:
    return [reference(model, prompt) for prompt in prompts()]


def _difference(served: Tokens, truth: Tokens, beside: Tokens, base: Tokens) -> str:
    wrong = sum(ours != theirs for ours, theirs in zip(served, truth, strict=True))
    said = f"{wrong} of {len(truth)} prompts differ"
    said += ", all as the base answers" if served == base else ""
    return said + (f"; {_count(beside, base)} of the base's own beside them differ" if beside != base else "")


def _count(ours: Sequence[list[int]], theirs: Sequence[list[int]]) -> int:
    return sum(one != other for one, other in zip(ours, theirs, strict=True))
