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
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from server.errors import InvalidRequest

# of <|end|>, [INST], <｜User｜>; an added token without one is a word or white space as any
_BRACKETS = set("<>[]{}|\uff5c")


class ControlTokens:
    """Control tokens: the special ones, and added ones in brackets that the chat template writes, since some models'
    turns are not marked as special. `written` is the template, and what it makes of a conversation of all roles.

    `unsealable` says why the tokenizer cannot be rebuilt with other names for them, if it cannot.
    """

    def __init__(self, tokenizer: Tokenizer, written: str) -> None:
        description = json.loads(tokenizer.to_str())
        added = [
            it
            for it in description["added_tokens"]
            if it["special"] or (it["content"] in written and _BRACKETS & set(it["content"]))
        ]
        names = sorted({it["content"] for it in added if it["content"]}, key=len, reverse=True)
        # digits: no normalizer and no filter of a template changes them
        self._sealed = {name: f"{_number()}{index:05d}" for index, name in enumerate(names)}
        self._opaque = {name: f"{_number()}{index:05d}" for index, name in enumerate(names)}
        self._any = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._any_opaque = re.compile("|".join(self._opaque.values()) or r"(?!)")
        self._names = {opaque: name for name, opaque in self._opaque.items()}
        self.unsealable = "a token must stand alone as a word" if any(it["single_word"] for it in added) else ""
        self._tokenizer = None if self.unsealable else self._rebuilt(description)

    def hide(self, message: str) -> str:
        """The message as the template may see it, without any control token."""
        return self._any.sub(lambda found: self._opaque[found[0]], message)

    def seal(self, rendered: str) -> tuple[Tokenizer, str]:
        """What the template made of messages that were hidden, as the text to tokenize, and what to tokenize it with.

        Raises InvalidRequest if the tokenizer is `unsealable`.
        """
        if self._tokenizer is None:
            raise InvalidRequest(
                f"a message spells a control token; this tokenizer cannot read it as text ({self.unsealable})",
                param="messages",
            )
        sealed = self._any.sub(lambda found: self._sealed[found[0]], rendered)
        return self._tokenizer, self._any_opaque.sub(lambda found: self._names[found[0]], sealed)

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


def _renamed(vocab: Any, names: Mapping[str, str]) -> Any:
    if isinstance(vocab, dict):  # BPE, WordPiece, WordLevel
        return {names.get(token, token): index for token, index in vocab.items()}
    return [[names.get(token, token), score] for token, score in vocab]  # Unigram


def _number() -> str:
    return str(secrets.randbelow(9 * 10**19) + 10**19)
