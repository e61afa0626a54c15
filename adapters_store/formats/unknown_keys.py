"""Keys of a configuration that nobody knows: a tool's own notes, or something newer that changes the arithmetic.

A text is a note. Of anything else only its author knows, so it is refused, unless whoever sent the adapter says that
the key may be ignored. A key that is known cannot be ignored: it is read, or it says what is not served.
"""

from collections.abc import Collection, Mapping, Sequence

from adapters_store.errors import InvalidAdapter, UnsupportedAdapter, shown
from adapters_store.formats import remedies

_SHOWN = 8  # names of keys in a note
OFF: tuple[object, ...] = (None, False, [])  # an empty object is not off: PEFT takes it for one of defaults


def refuse_known(ignore_keys: Collection[str], arithmetic: Collection[str], file: str) -> None:
    named = [key for key in ignore_keys if key in arithmetic]
    if named:
        raise InvalidAdapter(
            f"ignore_keys names {shown(named[0])!r}, which is no unknown key of {file}: what it means is known, and "
            "ignoring it would change what the adapter computes; take it out of ignore_keys"
        )


def check_unknown(
    config: Mapping[str, object], known: Collection[str], ignore_keys: Collection[str], file: str
) -> list[str]:
    """Notes on the unknown keys that are passed over. Raises UnsupportedAdapter for those that are not."""
    unknown = [key for key, value in config.items() if key not in known and value not in OFF]
    refused = [key for key in unknown if key not in ignore_keys and not isinstance(config[key], str)]
    if refused:
        key = refused[0]
        raise UnsupportedAdapter(
            f"{shown(key)} = {value_of(config[key])} in {file} is not known, so it may change what the adapter "
            f"computes: {remedies.UNKNOWN_KEY}"
        )
    ignored = [key for key in unknown if key in ignore_keys]
    texts = [key for key in unknown if key not in ignore_keys]
    notes = [f"{file}: ignored as asked: {_listed(ignored)}."] if ignored else []
    return notes + ([f"{file}: unknown keys that hold a text were passed over: {_listed(texts)}."] if texts else [])


def value_of(value: object) -> str:
    """A configuration's value in a message: in full only where it cannot be somebody's text."""
    if value is None or isinstance(value, bool | int | float):
        return shown(repr(value))
    if isinstance(value, str) and value in remedies.WORDS:
        return repr(value)
    return "(a text)" if isinstance(value, str) else "(a list)" if isinstance(value, list) else "(an object)"


def _listed(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(shown(key) for key in keys[:_SHOWN]) + more
