"""An op that launches kernels: the plain function that it is, and an op of torch's library where a step is traced.

A call through torch's library costs the host 7 to 14 microseconds, which is as much again as the launch. Only a trace
needs it: there an op is noted by its name, and its fake says what shapes come out of it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, ParamSpec, TypeVar

import torch

_is_traced = ContextVar("is_traced", default=False)
P = ParamSpec("P")
R = TypeVar("R")


class Launch(Generic[P, R]):
    def __init__(self, name: str, function: Callable[P, R], mutates_args: Sequence[str]) -> None:
        self._function = function
        self._registered: Any = torch.library.custom_op(f"heddle::{name}", function, mutates_args=tuple(mutates_args))
        self.__doc__ = function.__doc__

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        called = self._registered if _is_traced.get() else self._function
        return called(*args, **kwargs)  # type: ignore[no-any-return]

    @property
    def registered(self) -> Any:
        """The op, as torch.library.opcheck takes it."""
        return self._registered

    def register_fake(self, fake: Callable[..., R]) -> Callable[..., R]:
        """What has the op's shapes and no contents."""
        self._registered.register_fake(fake)
        return fake


def launch(name: str, mutates_args: Sequence[str] = ()) -> Callable[[Callable[P, R]], Launch[P, R]]:
    """Registers the function as heddle::name. mutates_args: the arguments that it writes to."""
    return lambda function: Launch(name, function, mutates_args)


@contextmanager
def traced() -> Iterator[None]:
    """Go through torch's library, so that a dispatch mode sees every op and tensors need no contents."""
    token = _is_traced.set(True)
    try:
        yield
    finally:
        _is_traced.reset(token)
