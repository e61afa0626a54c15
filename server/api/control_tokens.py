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
from typing import Any

from tokenizers import Tokenizer

from server.errors import InvalidRequest

# of <|end|>, [INST], <｜User｜>; an added token without one is a word or white space as any
_BRACKETS = set("<>[]{}|\uff5c")


class ControlTokens:
    """Control tokens: the special ones, and added ones in brackets that the chat template writes, since some models'
    turns are not marked as special. `template` is its source, `rehearsed` what it makes of conversations of all roles.

    `unsealable` says why the tokenizer cannot be rebuilt with other names for them, if it cannot.
    """

    def __init__(self, tokenizer: Tokenizer, template: str, rehearsed: Sequence[str]) -> None:
        description = json.loads(tokenizer.to_str())
        written = "".join((template, *rehearsed))
        added = [
            it
            for it in description["added_tokens"]
            if it["special"] or (it["content"] in written and _BRACKETS & set(it["content"]))
        ]
        names = [name for name in dict.fromkeys(it["content"] for it in added) if name]
        sealed, opaque = _number(), _number()
        self._sealed = {name: f"{sealed}{index:05d}" for index, name in enumerate(names)}
        self._opaque = {name: f"{opaque}{index:05d}" for index, name in enumerate(names)}
        self._names = {number: name for name, number in self._opaque.items()}
        self._any, self._any_opaque = _any_of(names), re.compile(rf"{opaque}\d{{5}}")
        self._normalizer = tokenizer.normalizer
        self.unsealable = "a token must stand alone as a word" if any(it["single_word"] for it in added) else ""
        self._twin = None if self.unsealable else self._rebuilt(description)
        if self._twin is not None and any(
            self._twin.encode(self._seal(text), add_special_tokens=False).ids
            != tokenizer.encode(text, add_special_tokens=False).ids
            for text in rehearsed
        ):
            self.unsealable, self._twin = "under other names its control tokens are not found", None

    def hide(self, message: str) -> str:
        """The message as the template may see it, without any control token."""
        return self._any.sub(lambda found: self._opaque[found[0]], message)

    def may_be_spelled(self, messages: Iterable[str]) -> bool:
        """Whether the tokenizer itself could find a control token in what these messages say. It looks at some after
        it has normalized the text, and then finds them in letters that only look alike."""
        if self._normalizer is not None and self._twin is not None:
            return True  # the twin is exact, so there is no need to look
        texts = messages if self._normalizer is None else map(self._normalizer.normalize_str, messages)
        return any(self._any.search(text) for text in texts)

    def seal(self, rendered: str) -> tuple[Tokenizer, str]:
        """What the template made of messages that were hidden, as the text to tokenize, and what to tokenize it with.

        Raises InvalidRequest if the tokenizer is `unsealable`.
        """
        if self._twin is None:
            raise InvalidRequest(
                f"a message spells a control token; this tokenizer cannot read it as text ({self.unsealable})",
                param="messages",
            )
        return self._twin, self._seal(rendered)

    def _seal(self, rendered: str) -> str:
        sealed = self._any.sub(lambda found: self._sealed[found[0]], rendered)
        return self._any_opaque.sub(lambda found: self._names.get(found[0], found[0]), sealed)

    def _rebuilt(self, description: dict[str, Any]) -> Tokenizer | None:
        """The same tokenizer, in which control tokens have their sealed names."""
        ids = {it["content"]: it["id"] for it in description["added_tokens"]}
        for token in description["added_tokens"]:
            token["content"] = self._sealed.get(token["content"], token["content"])
        model = description["model"]
        model["vocab"] = _renamed(model["vocab"], self._sealed)
        if model.get("unk_token") in self._sealed:
            model["unk_token"] = self._sealed[model["unk_token"]]
        try:
            rebuilt = Tokenizer.from_str(json.dumps(description))
        except Exception as error:  # the library raises nothing narrower
            self.unsealable = str(error)[:200]
            return None
        moved = [name for name, sealed in self._sealed.items() if rebuilt.token_to_id(sealed) != ids[name]]
        if moved:
            self.unsealable = f"{moved[0]!r} would get another id"
            return None
        return rebuilt


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
