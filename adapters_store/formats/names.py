"""Names of modules: those that a file uses, and the base's own for the same thing.

A file's names are those of the model that was trained, which may have stood in something: in torch.compile or FSDP, in
a PEFT model a second time, in the text part of a multimodal model. Other versions and other tools use other words for a
module. The plain name always wins; any other is reduced, as the base's are, to what such names have in common.

    base_model.model.model.language_model.layers.0.block_sparse_moe.gate
                     └── prefix ───────┘                                     -> layers.0.mlp.gate
    model.layers.0.mlp.gate                                                  -> layers.0.mlp.gate
"""

from collections.abc import Iterable
from typing import NamedTuple

from adapters_store.errors import InvalidAdapter, shown

PEFT_PREFIX = "base_model.model."
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# what stands before the layers (or lm_head) of a language model; the first match counts
_PREFIXES = ("model.language_model.model.", "model.language_model.", "language_model.model.", "language_model.",
             "model.text_model.", "model.")  # fmt: skip
# words of Mixtral under Transformers 4, and of Tinker, with those that most bases use
_WORDS = {"block_sparse_moe": "mlp", "attn": "self_attn", "unembed_tokens": "lm_head"}


class ModulePath(NamedTuple):
    """A module as a file names it. `plain` is without PEFT's prefix and without wrappers; `known_by` is what PEFT may
    have matched patterns with: a wrapper may have been put around the model before PEFT was, or after it."""

    plain: str
    known_by: tuple[str, ...]
    oddities: tuple[str, ...]
    num_prefixes: int  # of PEFT's


def module_path(name: str) -> ModulePath:
    steps = name.split(".")
    wrappers = [step for step in steps if step in _WRAPPERS]
    rest = ".".join(step for step in steps if step not in _WRAPPERS) if wrappers else name
    count = 0
    while rest.startswith(PEFT_PREFIX):
        rest, count = rest.removeprefix(PEFT_PREFIX), count + 1
    oddities = [f"tensors: {wrapper}. in the name was left out." for wrapper in dict.fromkeys(wrappers)]
    if count != 1:
        stands = (
            "is missing, and was taken as meant" if count == 0 else "stands there more than once, and was read as one"
        )
        oddities.append(f"tensors: the prefix {PEFT_PREFIX} {stands}.")
    return ModulePath(rest, tuple(dict.fromkeys((rest, name.removeprefix(PEFT_PREFIX)))), tuple(oddities), count)


class BaseNames:
    """Finds the base's own name of a module that a file names. `known` are the base's modules and whatever else a
    module of a file may be called."""

    def __init__(self, known: Iterable[str]) -> None:
        self._known = set(known)
        self._reduced: dict[str, str | None] = {}
        for name in sorted(self._known):
            reduced = _reduced(name)
            self._reduced[reduced] = None if reduced in self._reduced else name  # None: of two one cannot say which
        self._prefixes: dict[tuple[int, str], str] = {}  # of layers in the file -> the first module that has it

    def find(self, plain: str) -> str | None:
        return plain if plain in self._known else self._reduced.get(_reduced(plain))

    def renamings(self, plain: str, name: str) -> list[str]:
        """Sentences on how the base's `name` differs from the file's."""
        if plain == name:
            return []
        theirs, ours = _prefix(plain), _prefix(name)
        told = [] if theirs == ours else [f"tensors: {_told(theirs)} was read as {ours or 'none.'}"]
        steps, own_steps = set(plain.split(".")), set(name.split("."))
        for word, usual in _WORDS.items():
            for old, new in ((word, usual), (usual, word)):
                if old in steps - own_steps and new in own_steps - steps:
                    told.append(f"tensors: {old} was read as {new}.")
        return told

    def note_prefix(self, path: ModulePath) -> None:
        """Raises InvalidAdapter if one file names layers in two ways: they may be those of two models."""
        prefix = _prefix(path.plain)
        if not path.plain.startswith(f"{prefix}layers."):
            return
        self._prefixes.setdefault((path.num_prefixes, prefix), path.known_by[-1])
        if len(self._prefixes) > 1:
            one, other = list(self._prefixes.values())[:2]
            raise InvalidAdapter(
                f"the file names layers in two ways, {shown(one)} and {shown(other)}, which may be those of two "
                "models: keep the tensors of the one that is served, under one prefix"
            )


def _prefix(name: str) -> str:
    return next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")


def _reduced(name: str) -> str:
    bare = name[len(_prefix(name)) :]
    return ".".join(_WORDS.get(step, step) for step in bare.split("."))


def _told(prefix: str) -> str:
    return f"the prefix {prefix}" if prefix else "no prefix"
