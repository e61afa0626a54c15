"""The formats of calls that are known, in the order in which they are tried."""

from collections.abc import Mapping

from server.api.texts.calls import json_calls, named_calls, pythonic, tagged_calls
from server.api.texts.calls.format import CallFormat
from server.api.texts.calls.harmony import HARMONY

# those whose calls can be found anywhere in a text come before those that a whole answer is
_ALL: tuple[CallFormat, ...] = (
    HARMONY,
    *named_calls.FORMATS,
    *tagged_calls.FORMATS,
    *json_calls.FORMATS,
    *pythonic.FORMATS,
    *json_calls.BARE_FORMATS,
    *pythonic.BARE_FORMATS,
)
CALL_FORMATS: Mapping[str, CallFormat] = {it.name: it for it in _ALL}
