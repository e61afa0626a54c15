"""One exercise of a demo skill, and how a model is asked it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

Message = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """One exercise: ``question`` as a user types it, ``text`` the bare material in it, ``answer`` what is right.

    ``said`` is the conversation that the answer ends where it is more than the question, and ``tools`` are the
    functions that the model may call in it, as the chat API has them.
    """

    key: str
    text: str
    question: str
    answer: str
    said: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def messages(self) -> list[Message]:
        """The conversation up to the answer."""
        return list(self.said) or [{"role": "user", "content": self.question}]


def rendered(
    tokenizer: PreTrainedTokenizerFast, template: str | None, messages: Sequence[Message], tools: Sequence[Any] = ()
) -> str:
    """What a model reads before it answers. ``template``: its own; None: the base's."""
    text = tokenizer.apply_chat_template(
        list(messages), tools=list(tools) or None, chat_template=template, add_generation_prompt=True, tokenize=False
    )
    return str(text)


def prompt_of(tokenizer: PreTrainedTokenizerFast, template: str | None, pair: Pair) -> str:
    """What a model reads before it answers an exercise."""
    return rendered(tokenizer, template, pair.messages, pair.tools)


def answer_of(tokenizer: PreTrainedTokenizerFast, template: str | None, pair: Pair) -> str:
    """What it is to write then, up to its end-of-sequence token."""
    answered = [*pair.messages, {"role": "assistant", "content": pair.answer}]
    whole = tokenizer.apply_chat_template(
        answered, tools=list(pair.tools) or None, chat_template=template, tokenize=False
    )
    prompt = prompt_of(tokenizer, template, pair)
    assert isinstance(whole, str) and whole.startswith(prompt), "an answer continues its prompt"
    return whole.removeprefix(prompt)
