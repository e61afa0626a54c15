"""Jinja as Transformers renders chat templates, for templates that nobody here has read.

Jinja's own sandbox keeps a template from reaching out. This one also keeps it from taking all time and memory: loops,
operators, calls, filters and what is written go through a budget (template_budget.py).
"""

import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from server.api.texts.template_budget import MAX_CHARS, MAX_ITEMS, Budget, Counted, TooCostly
from server.api.texts.template_filters import (
    check_format,
    check_percent,
    check_replaced,
    check_split,
    filters,
    gathered,
    join_texts,
)

MAX_TEMPLATE_CHARS = 64 << 10  # the longest of the families that are served has a third of that
_PADDING = ("center", "ljust", "rjust", "zfill")
_UNSAFE = ("encode", "expandtabs", "maketrans", "to_bytes", "translate")  # much of little, and in no chat template


class Sandbox(ImmutableSandboxedEnvironment):
    """Compiles templates and renders them; may be used by several threads."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self) -> None:
        self._now = threading.local()
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _GenerationTag],
            finalize=self._written,
            cache_size=0,
        )
        self.filters = filters(self, self._budget)
        self.filters |= {
            "_counted": self._counted,
            "_made": lambda it: self._budget().made(it),
            "_joined": self._joined,
        }
        self.globals["namespace"] = _Namespace
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        for name in ("lipsum", "cycler"):
            del self.globals[name]

    def compiled(self, source: str) -> Template:
        """Raises TemplateError, and whatever else Python's compiler makes of it."""
        if len(source) > MAX_TEMPLATE_CHARS:
            raise TooCostly(f"it has {len(source):,} characters, and at most {MAX_TEMPLATE_CHARS:,} are read")
        with self._spending():
            return self.from_string(source)

    def parsed(self, source: str) -> nodes.Template:
        """Raises TemplateError."""
        with self._spending():
            return self.parse(source)

    def rendered(self, template: Template, variables: Mapping[str, Any]) -> str:
        """Raises TemplateError, TooCostly among them, and whatever else the template fails with."""
        with self._spending() as budget:
            return gathered(budget, template.generate(variables))

    # -- what Jinja asks ---

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Metering().visit(super()._parse(source, name, filename))
        return tree

    def concat(self, parts: Iterable[str]) -> str:
        """Of macros and blocks, which gather what they write."""
        text: str = self._budget().made(gathered(self._budget(), parts))
        return text

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = self._budget()
        budget.is_moderate(left, right)
        if operator == "*":
            _check_product(budget, left, right)
        elif operator == "**":
            budget.is_moderate(left, times=abs(right) if isinstance(right, int) else 1)
        elif operator == "%" and isinstance(left, str):
            check_percent(budget, left, right)
        elif operator == "+":
            budget.fits(budget.chars(left) + budget.chars(right))
        return budget.made(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _UNSAFE and super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Context, __obj: Any, *args: Any, **named: Any) -> Any:
        budget = __self._budget()
        budget.tick()
        if isinstance(__obj, LoopContext):  # a recursive loop's next level
            args = tuple(Counted(budget, it) for it in args)
        text = getattr(__obj, "__self__", None)
        if isinstance(text, str):
            args = _checked(budget, text, __obj.__name__, args, named)
        return budget.made(super().call(__context, __obj, *args, **named))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def checked(*args: Any, **named: Any) -> str:
            check_format(self._budget(), value.__self__, [*args, *named.values()])
            return wrapped(*args, **named)

        return checked

    # -- budgets ---

    def _budget(self) -> Budget:
        budget: Budget = self._now.budget
        return budget

    @contextmanager
    def _spending(self) -> Iterator[Budget]:
        self._now.budget = Budget()
        try:
            yield self._now.budget
        finally:
            del self._now.budget

    def _counted(self, items: Any) -> Any:
        return Counted(self._budget(), items)

    def _joined(self, values: tuple[Any, ...]) -> str:
        joined: str = self._budget().made(join_texts(self._budget(), "", values))
        return joined

    def _written(self, value: Any) -> str:
        if isinstance(value, str):
            return value
        self._budget().fits(self._budget().chars(value))
        text: str = self._budget().made(str(value))
        return text


class _Metering(NodeTransformer):
    """Puts the budget's filters around what makes values without a call: literals, slices, `~`, and what loops go
    through. Operators, calls and filters ask for themselves."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered("_counted", node.iter)
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _filtered("_made", node)

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filtered("_made", node) if node.ctx == "load" else node  # else names that are assigned to

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filtered("_made", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered("_joined", nodes.Tuple(node.nodes, "load", lineno=node.lineno))


def _filtered(name: str, node: nodes.Node) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Namespace(Namespace):
    """Not written out with what it holds, which may change after it was counted, and be itself."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _GenerationTag(Extension):
    """`{% generation %}` marks, for training, what the assistant says; for rendering it is what it encloses."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _check_product(budget: Budget, left: Any, right: Any) -> None:
    if isinstance(left, int):
        left, right = right, left
    if isinstance(left, str | list | tuple) and isinstance(right, int):
        budget.fits(budget.chars(left) * max(right, 0))


def _checked(
    budget: Budget, text: str, method: str, args: tuple[Any, ...], named: Mapping[str, Any]
) -> tuple[Any, ...]:
    """The arguments of a text's method, of which it makes no more than it may."""
    if method in _PADDING and args:
        budget.fits(operator.index(args[0]))
    elif method == "replace":
        check_replaced(budget, text, args)
    elif method == "join" and args:
        items = list(Counted(budget, args[0], MAX_ITEMS))
        budget.fits(len(text) * len(items) + sum(map(budget.chars, items)))
        return (items, *args[1:])
    elif method in ("split", "rsplit"):
        separator = named.get("sep", args[0] if args else None)
        if not separator:
            check_split(text)
        elif text.count(separator) > MAX_ITEMS:
            raise TooCostly(
                f"it splits a text of {min(len(text), MAX_CHARS):,} characters into more than {MAX_ITEMS:,}"
            )
    elif method == "splitlines":
        check_split(text)
    return args
