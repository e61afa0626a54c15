"""Calls of tools in earlier turns, and their results, as templates read them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from server.api.protocol.json_text import is_deeper, object_in, refuse_too_much
from server.errors import InvalidRequest

MAX_ARGUMENTS_DEPTH = 64  # of lists and objects in one another


class CallMade(NamedTuple):
    id: str
    name: str
    arguments: Mapping[str, Any]

    @property
    def said(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class CallsMade:
    """Which calls the turn before made. `param`: the request's field, for what is said of it."""

    def __init__(self, param: str) -> None:
        self._param = param
        self._names: dict[str, str] = {}

    def turn(self) -> None:
        """Another turn of the assistant's begins: what was called before was answered, or never will be."""
        self._names = {}

    def made(self, call: CallMade) -> CallMade:
        """Raises InvalidRequest for one of the same id."""
        if call.id in self._names:
            raise self._refusal(f"two calls in one turn have the id {call.id[:100]!r}")
        self._names[call.id] = call.name
        return call

    def result(self, id: str, text: str) -> dict[str, Any]:
        """A message with what a call came to. Raises InvalidRequest where it was not made."""
        return {"role": "tool", "content": text, "tool_call_id": id, "name": self.name_of(id)}

    def name_of(self, id: str, said: str | None = None) -> str:
        """What the call was of, which some templates read and clients leave out. `said`: what the client calls it.
        Raises InvalidRequest where it was not made, or was of something else."""
        if id not in self._names:
            raise self._refusal(f"the call {id[:100]!r} is answered, and the assistant's turn before made no such call")
        name = self._names[id]
        if said and said != name:
            raise self._refusal(f"the result of the call {id[:100]!r} has the name {said[:100]!r}, and the call was of "
                                f"{name[:100]!r}")  # fmt: skip
        return name

    def _refusal(self, told: str) -> InvalidRequest:
        return InvalidRequest(f"{told} ({self._param})", param=self._param, code="invalid_value")


def read_arguments(texts: Sequence[str], param: str) -> list[dict[str, Any]]:
    """Of calls, as a model wrote them: each the text of a JSON object, or empty. What is none of it is handed on under
    the name that Anthropic has for it: a model may write anything, and hears of it in the call's result. Raises
    InvalidRequest for what is too much."""
    refuse_too_much(texts, f"arguments of calls in {param}", param)
    return [_read(text, param) if text else {} for text in texts]


def not_an_object(text: str) -> dict[str, Any]:
    """What stands for arguments that are none."""
    return {"INVALID_JSON": text}


def _read(text: str, param: str) -> dict[str, Any]:
    try:
        arguments = object_in(text)
    except RecursionError:
        raise _too_deep(param) from None
    return not_an_object(text) if arguments is None else checked_arguments(arguments, param)


def checked_arguments(value: Any, param: str) -> dict[str, Any]:
    """Raises InvalidRequest."""
    if not isinstance(value, dict):
        told = f"arguments of a call in {param} must be a JSON object"
        raise InvalidRequest(told, param=param, code="invalid_value")
    if is_deeper(value, MAX_ARGUMENTS_DEPTH):
        raise _too_deep(param)
    return value


def _too_deep(param: str) -> InvalidRequest:
    told = f"arguments of a call in {param} have lists or objects more than {MAX_ARGUMENTS_DEPTH} deep"
    return InvalidRequest(told, param=param, code="invalid_value")
