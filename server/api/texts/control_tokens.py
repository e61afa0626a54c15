"""What a message says is text, also where it spells a control token.

A chat template marks turns with tokens such as <|end|>. Whoever may write such a token into a message can end their
turn and begin another's, the system's for instance. So a control token counts where the template wrote it, and where it
stands in a message it is read as its letters:

    the message            a<|end|>b
    given to the template  a7312…7b                 an opaque word of digits in its place
    rendered               <|user|>a7312…7b<|end|>
    sealed                 9054…0a7312…7b9054…1     the template's own, by names that nobody can guess
    tokenized              9054…0a<|end|>b9054…1    by a tokenizer that knows control tokens by these names only
"""

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Tokenizer

from server.errors import InvalidRequest

# of <|end|>, [INST], <｜User｜>; an added token without one is a word or white space as any
_BRACKETS = set("<>[]{}|\uff5c")


class Twin:
    """A tokenizer in which every token that may be a control token has a name that nobody can guess; made once, for all
    templates, when it is first asked for.

    `added` are those tokens, special ones and others in brackets; `sealed` are their names there; `problem` says why it
    cannot be made, if it cannot.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().values()
        self.added: list[AddedToken] = [
            it for it in added if it.content and (it.special or _BRACKETS & set(it.content))
        ]
        number = _number()
        named = (it.content for it in self.added if it.special or not it.single_word)
        self.sealed = {name: f"{number}{index:05d}" for index, name in enumerate(dict.fromkeys(named))}
        self._any = _any_of(self.sealed)
        self.problem = ""

    @cached_property
    def twin(self) -> Tokenizer | None:
        return self._rebuilt(json.loads(self.tokenizer.to_str()))

    def seal(self, text: str) -> str:
        return self._any.sub(lambda found: self.sealed[found[0]], text)

    def finds_as(self, text: str) -> bool:
        """Whether it makes of the sealed text what the tokenizer makes of this."""
        found = self.twin and self.twin.encode(self.seal(text), add_special_tokens=False).ids
        return found == self.tokenizer.encode(text, add_special_tokens=False).ids

    def _rebuilt(self, description: dict[str, Any]) -> Tokenizer | None:
        ids = {it["content"]: it["id"] for it in description["added_tokens"]}
        for token in description["added_tokens"]:
            token["content"] = self.sealed.get(token["content"], token["content"])
        model = description["model"]
        model["vocab"] = _renamed(model["vocab"], self.sealed)
        if model.get("unk_token") in self.sealed:
            model["unk_token"] = self.sealed[model["unk_token"]]
        try:
            rebuilt = Tokenizer.from_str(json.dumps(description))
        except Exception as error:  # the library raises nothing narrower
            self.problem = str(error)[:200]
            return None
        moved = [name for name, sealed in self.sealed.items() if rebuilt.token_to_id(sealed) != ids[name]]
        if moved:
            self.problem = f"{moved[0]!r} would get another id"
            return None
        return rebuilt


class ControlTokens:
    """Those of one template: the special ones, and added ones in brackets that it writes, since some models' turns are
    not marked as special. `template` is its source, `rehearsed` what it makes of conversations of all roles.

    `unsealable` says why the tokenizer cannot have other names for them, if it cannot.
    """

    def __init__(self, twin: Twin, template: str, rehearsed: Sequence[str]) -> None:
        written = "".join((template, *rehearsed))
        added = [it for it in twin.added if it.special or it.content in written]
        names = list(dict.fromkeys(it.content for it in added))
        opaque = _number()
        self._opaque = {name: f"{opaque}{index:05d}" for index, name in enumerate(names)}
        self._names = {number: name for name, number in self._opaque.items()}
        self._any, self._any_opaque = _any_of(names), re.compile(rf"{opaque}\d{{5}}")
        self._normalizer = twin.tokenizer.normalizer
        self._twin = twin
        if any(it.single_word for it in added):
            self.unsealable = "a token must stand alone as a word"
        elif twin.twin is None:
            self.unsealable = twin.problem
        elif not all(map(twin.finds_as, rehearsed)):
            self.unsealable = "under other names its control tokens are not found"
        else:
            self.unsealable = ""

    def hide(self, message: str) -> str:
        """The message as the template may see it, without any control token."""
        return self._any.sub(lambda found: self._opaque[found[0]], message)

    def may_be_spelled(self, messages: Iterable[str]) -> bool:
        """Whether the tokenizer itself could find a control token in what these messages say. It looks at some after
        it has normalized the text, and then finds them in letters that only look alike."""
        if self._normalizer is not None and not self.unsealable:
            return True  # the twin is exact, so there is no need to look
        texts = messages if self._normalizer is None else map(self._normalizer.normalize_str, messages)
        return any(self._any.search(text) for text in texts)

    def seal(self, rendered: str) -> tuple[Tokenizer, str]:
        """What the template made of messages that were hidden, as the text to tokenize, and what to tokenize it with.

        Raises InvalidRequest if the tokenizer is `unsealable`.
        """
        if self.unsealable or self._twin.twin is None:
            raise InvalidRequest(
                f"a message spells a control token; this tokenizer cannot read it as text ({self.unsealable})",
                param="messages",
            )
        sealed = self._twin.seal(rendered)
        return self._twin.twin, self._any_opaque.sub(lambda found: self._names.get(found[0], found[0]), sealed)


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Finds the longest of the names, as a trie: an alternation would try every one of a thousand at each bracket."""
    root: dict[str, Any] = {}
    for name in names:
        node = root
        for char in name:
            node = node.setdefault(char, {})
        node[""] = {}
    return re.compile(_pattern(root) or r"(?!)")


def _pattern(node: dict[str, Any]) -> str:
    branches = [re.escape(char) + _pattern(below) for char, below in node.items() if char]
    if not branches:
        return ""
    body = branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
    return f"(?:{body})?+" if "" in node else body


def _renamed(vocab: Any, names: Mapping[str, str]) -> Any:
    if isinstance(vocab, dict):  # BPE, WordPiece, WordLevel
        return {names.get(token, token): index for token, index in vocab.items()}
    return [[names.get(token, token), score] for token, score in vocab]  # Unigram


def _number() -> str:
    """Nobody can guess it, and no normalizer and no filter of a template changes digits."""
    return str(secrets.randbelow(9 * 10**19) + 10**19)
