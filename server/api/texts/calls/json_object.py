"""A call as an object of JSON: {"name": …, "arguments": {…}}."""

from server.api.texts.incoming import Incoming, Steps
from server.api.texts.told import Told

NAMES = ("name", "tool_name")
ARGUMENTS = ("arguments", "parameters")
_BESIDE = ("id", "tool_call_id", "type")


class CallObject:
    """Reads one: its arguments are told as they come if its name came before them."""

    def __init__(self, text: Incoming, told: Told, known: frozenset[str] | None = None) -> None:
        """known: of which names it is a call; None: of any."""
        self._text, self._told, self._known = text, told, known
        self._name = ""
        self._held: list[str] = []  # arguments that came before the name
        self._has_begun = False

    def read(self) -> Steps[bool]:
        """Whether it was a call, perhaps one that broke off; then the attempt is committed to."""
        is_whole = (yield from self._text.literal("{")) and (yield from self._members())
        if is_whole and self._name and not self._has_begun:  # no arguments, or before the name
            self._begin()
            for it in self._held:
                self._told.arguments(it)
        if is_whole and self._has_begun:
            self._told.end_call()
        return self._has_begun

    def _members(self) -> Steps[bool]:
        """Whether the object came to its end."""
        while True:
            char = yield from self._text.space()
            if char == "}":
                return (yield from self._text.literal("}"))
            if char == ",":
                yield from self._text.literal(",")
                continue
            key = yield from self._text.string()
            if key is None or (yield from self._text.space()) != ":":
                return False
            yield from self._text.literal(":")
            if not (yield from self._member(key)):
                return False

    def _member(self, key: str) -> Steps[bool]:
        char = yield from self._text.space()
        if key in NAMES and not self._name:
            name = yield from self._text.string()
            self._name = name or ""
            return bool(name) and (self._known is None or name in self._known)
        if key in ARGUMENTS and not self._has_begun and not self._held:
            return (yield from self._arguments(char))
        if self._known is not None and key not in _BESIDE:  # an object of JSON that the model was asked for
            return False
        return (yield from self._text.value(_nobody))

    def _arguments(self, first: str) -> Steps[bool]:
        if self._name:
            self._begin()
        tell = self._told.arguments if self._has_begun else self._held.append
        if first == '"':  # an object in a string
            inside = yield from self._text.text_in_string()
            if inside is not None:
                tell(inside)
            return inside is not None
        if first == "n":
            return (yield from self._text.literal("null"))
        return (yield from self._text.value(tell))

    def _begin(self) -> None:
        self._has_begun = True
        self._text.commit()
        self._told.begin_call(self._name)


def _nobody(text: str) -> None:
    """Is told."""
