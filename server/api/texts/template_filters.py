"""What templates may do with values, where it can make much of little: each is asked how much before it is done.

Filters that no chat template uses and that would need such a look (center, wordwrap, urlize, batch, …) are not there.
"""

import json
import re
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from jinja2.environment import Environment
from jinja2.filters import FILTERS, make_attrgetter

from server.api.texts.template_budget import MAX_ITEMS, Budget, Counted, TooCostly

_PLAIN = ("abs", "attr", "capitalize", "count", "d", "default", "e", "escape", "first", "float", "int", "items", "last",
          "length", "lower", "reverse", "safe", "string", "trim", "truncate", "upper")  # fmt: skip
_OVER_ITEMS = ("dictsort", "groupby", "list", "map", "max", "min", "reject", "rejectattr", "select", "selectattr",
               "sort", "unique")  # fmt: skip
_MAX_WIDTH = 1000  # of an indentation, of a separator, in a format
_FIELD = re.compile(r"\{[^{}]*\{")  # a field in a field: its width is not known yet
_WIDTH = re.compile(r"\d{4}")

Spend = Callable[[], Budget]


def filters(environment: Environment, budget: Spend) -> dict[str, Callable[..., Any]]:
    """By name. Each charges for what it makes."""
    found: dict[str, Callable[..., Any]] = {name: _metered(FILTERS[name], budget) for name in _PLAIN}
    found |= {name: _metered(_over_items(FILTERS[name], budget), budget) for name in _OVER_ITEMS}

    def join(value: Any, d: str = "", attribute: str | int | None = None) -> str:
        items = Counted(budget(), value, MAX_ITEMS)
        get = make_attrgetter(environment, attribute) if attribute is not None else None
        return join_texts(budget(), str(d), [get(item) if get else item for item in items])

    def replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
        text = str(value)
        check_replaced(budget(), text, (str(old), str(new)))
        return text.replace(str(old), str(new), -1 if count is None else count)

    def indent(value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        text = str(value)
        wide = width if isinstance(width, int) else len(width)
        check_width(wide)
        check_split(text)
        budget().fits(len(text) + wide * (len(text.splitlines()) + 1))
        indented: str = FILTERS["indent"](text, width, first, blank)
        return indented

    def format(value: Any, *args: Any, **named: Any) -> Any:
        check_percent(budget(), str(value), named or args)
        return str(value) % (named or args)

    def round(value: float, precision: int = 0, method: str = "common") -> Any:
        check_width(abs(precision))
        return FILTERS["round"](value, precision, method)

    def sum(values: Any, attribute: str | int | None = None, start: Any = 0) -> Any:
        get = make_attrgetter(environment, attribute) if attribute is not None else None
        total = start
        for item in Counted(budget(), values, MAX_ITEMS):
            number = get(item) if get else item
            if not isinstance(number, int | float) or not isinstance(total, int | float):
                raise TooCostly("it sums what are no numbers")
            total += number
        return total

    def title(value: Any) -> str:
        check_split(str(value))
        titled: str = FILTERS["title"](value)
        return titled

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | str | None = None,
               separators: Sequence[str] | None = None, sort_keys: bool = False) -> str:  # fmt: skip
        """As Transformers has it: HTML is not escaped."""
        if indent is not None:
            check_width(indent if isinstance(indent, int) else len(indent))
        if separators is not None:
            check_width(len("".join(separators)))
        item, key = separators or (", " if indent is None else ",", ": ")
        if indent is None and separators is None:
            budget().fits(budget().chars(value))
            return json.dumps(value, ensure_ascii=ensure_ascii, sort_keys=sort_keys)
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=(item, key), sort_keys=sort_keys
        )
        return gathered(budget(), encoder.iterencode(value))

    own = (join, replace, indent, format, round, sum, title, tojson)
    return found | {it.__name__: _metered(it, budget) for it in own}


def check_width(width: int) -> None:
    if width > _MAX_WIDTH:
        raise TooCostly(f"it asks for a width of more than {_MAX_WIDTH:,}")


def check_split(text: str) -> None:
    """Into words or lines."""
    if len(text) // 2 > MAX_ITEMS * 8:
        raise TooCostly(f"it splits a text of {len(text):,} characters into words or lines")


def check_replaced(budget: Budget, text: str, args: Sequence[Any]) -> None:
    if len(args) >= 2 and isinstance(args[0], str) and isinstance(args[1], str):
        budget.fits(len(text) + text.count(args[0]) * len(args[1]))


def check_percent(budget: Budget, text: str, args: Any) -> None:
    """`text % args`."""
    if "*" in text or _WIDTH.search(text):
        raise TooCostly(f"it asks for a width of {_MAX_WIDTH:,} or more")
    budget.fits(len(text) + text.count("%") * (budget.chars(args) + _MAX_WIDTH))


def check_format(budget: Budget, text: str, args: Any) -> None:
    """`text.format(…)`; args: the values, with names or without."""
    if _FIELD.search(text) or _WIDTH.search(text):
        raise TooCostly(f"it asks for a width of {_MAX_WIDTH:,} or more, or for one that is a field")
    budget.fits(len(text) + text.count("{") * (budget.chars(args) + _MAX_WIDTH))


def join_texts(budget: Budget, separator: str, items: Sequence[Any]) -> str:
    budget.fits(len(separator) * len(items) + sum(map(budget.chars, items)))
    return separator.join(map(str, items))


def gathered(budget: Budget, parts: Any) -> str:
    """Texts that come one after another, counted as they come."""
    kept: list[str] = []
    chars = 0
    for number, part in enumerate(parts):
        chars += len(part)
        budget.fits(chars)
        if number % 64 == 0:
            budget.tick()
        kept.append(part)
    return "".join(kept)


def _metered(function: Callable[..., Any], budget: Spend) -> Callable[..., Any]:
    @wraps(function)  # with what says that it wants the context
    def metered(*args: Any, **named: Any) -> Any:
        return budget().made(function(*args, **named))

    return metered


def _over_items(function: Callable[..., Any], budget: Spend) -> Callable[..., Any]:
    """A filter that goes through its input. Where Jinja passes it something first, the input is the second."""
    place = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def over_items(*args: Any, **named: Any) -> Any:
        if not isinstance(args[place], dict):
            args = (*args[:place], Counted(budget(), args[place], MAX_ITEMS), *args[place + 1 :])
        return function(*args, **named)

    return over_items
