"""A conversation whose last turn is the model's own and has begun already: it reads on from the last word there."""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from server.errors import InvalidRequest


class OpenTurn:
    """Templates end what they write of a message. So a word that nobody can guess stands behind the last one when it is
    rendered, and what a template writes from there on is cut off:

        messages    user: hi    assistant: Hel7312…7
        rendered    <|user|>hi<|end|><|assistant|>Hel7312…7<|end|>
        cut         <|user|>hi<|end|><|assistant|>Hel
    """

    def __init__(self, messages: Sequence[Mapping[str, Any]]) -> None:
        if messages[-1].get("tool_calls"):
            raise InvalidRequest(
                "the last message calls tools, so there is no text that the model could continue; leave it out, or add "
                "the tools' results",
                param="messages",
            )
        self._begun: str = messages[-1]["content"] or ""
        self._mark = str(secrets.randbelow(9 * 10**29) + 10**29)  # digits: no filter of a template changes them
        self.messages = [*messages[:-1], {**messages[-1], "content": self._begun + self._mark}]

    def cut(self, rendered: str) -> str:
        """Raises InvalidRequest if the template does not write all of the turn's words, or more than once."""
        text, *others = rendered.split(self._mark)
        if len(others) != 1 or not text.endswith(self._begun.lstrip()):
            raise InvalidRequest(
                "this model's chat template writes the last message, the assistant's, in other words, so that the "
                "model could not continue it; leave it out",
                param="messages",
            )
        return text
