"""What one rendering of a chat template may cost.

A template is a program, and may come with an adapter that a stranger registered. Every value that it makes is seen
here: how large it is with all that it holds (lists of lists of one long text are small in memory and endless when
written out), and how much all of them are together. So whatever an operator or a filter does next with a value takes
milliseconds, and between two of them the clock is looked at.
"""

import sys
import time
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Sized, ValuesView
from typing import Any

from jinja2 import TemplateError
from jinja2.runtime import LoopContext

MAX_SECONDS = 0.5  # of the processor: a thousand messages take twenty milliseconds
MAX_LOOPS = 500_000  # turns of all loops: a look back from each of a thousand messages at all before it is as many
MAX_CHARS = 8 << 20  # of one text or value written out, and of the whole
MAX_BYTES = 128 << 20  # of all values together
MAX_ITEMS = 1 << 17  # that a filter goes through, or a text is split into
_MAX_BITS = 4096  # of an integer
_CHARS_OF_ITEM = 64  # what a list counts for each of its items, as much as it takes
_HOLDERS = (list, tuple, dict, KeysView, ValuesView, ItemsView)


class TooCostly(TemplateError):
    """The message says which limit was exceeded."""


class Counted:
    """An iterable whose turns are counted as they are taken, at most `most` of them. It has a length if what it counts
    has, so that loops know their last turn."""

    def __init__(self, budget: "Budget", inner: Iterable[Any], most: int = MAX_LOOPS) -> None:
        self._budget, self._inner, self._most = budget, inner, most

    def __iter__(self) -> Iterator[Any]:
        for turn, item in enumerate(self._inner):
            if turn >= self._most:
                raise TooCostly(f"it goes through more than {self._most:,} items")
            self._budget.turn()
            yield item

    def __len__(self) -> int:
        if isinstance(self._inner, Sized):
            return len(self._inner)
        raise TypeError("an iterator has no length")

    def __bool__(self) -> bool:
        return len(self._inner) > 0 if isinstance(self._inner, Sized) else True


class Budget:
    """Of one rendering, or of compiling one template."""

    def __init__(self) -> None:
        self._deadline = time.thread_time() + MAX_SECONDS
        self._loops = 0
        self._bytes = 0
        self._sizes: dict[int, tuple[object, int]] = {}  # of containers, which are kept so that ids stay theirs

    def tick(self) -> None:
        if time.thread_time() > self._deadline:
            raise TooCostly(f"it takes more than {MAX_SECONDS:g} s")

    def turn(self) -> None:
        self._loops += 1
        if self._loops > MAX_LOOPS:
            raise TooCostly(f"its loops take more than {MAX_LOOPS:,} turns")
        if self._loops % 16 == 0:  # a body of a whole template takes a millisecond
            self.tick()

    def made(self, value: Any) -> Any:
        """`value` itself, or if it is an iterator one that is counted."""
        self.tick()
        if isinstance(value, str):
            self.fits(len(value))
            self._keep(sys.getsizeof(value))
        elif isinstance(value, int):
            self.is_moderate(value)
        elif isinstance(value, Iterator) and not isinstance(value, LoopContext):
            return iter(Counted(self, value))
        elif isinstance(value, list | tuple | dict):
            self.fits(self.chars(value))
            self._keep(_CHARS_OF_ITEM * len(value))
        return value

    def fits(self, chars: int) -> None:
        """Asked before what would have so many is made."""
        if chars > MAX_CHARS:
            raise TooCostly(f"it makes a text or list of more than {MAX_CHARS:,} characters")

    def is_moderate(self, *values: Any, times: int = 1) -> None:
        """Whether arithmetic with these takes no time to speak of."""
        if any(isinstance(value, int) and value.bit_length() * times > _MAX_BITS for value in values):
            raise TooCostly(f"it makes a number of more than {_MAX_BITS:,} bits")

    def chars(self, value: Any) -> int:
        """About how many characters it has when written out. What is met several times counts each time."""
        if isinstance(value, str):
            return len(value)
        if not isinstance(value, _HOLDERS):
            return _CHARS_OF_ITEM
        if id(value) in self._sizes:
            return self._sizes[id(value)][1]
        total = _CHARS_OF_ITEM * (len(value) + 1) + sum(map(self.chars, value))
        if isinstance(value, dict):
            total += sum(map(self.chars, value.values()))
        self._sizes[id(value)] = value, total
        return total

    def _keep(self, num_bytes: int) -> None:
        self._bytes += num_bytes
        if self._bytes > MAX_BYTES:
            raise TooCostly(f"the values that it makes take more than {MAX_BYTES:,} bytes")
