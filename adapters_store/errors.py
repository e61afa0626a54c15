"""Why an adapter is refused.

    AdapterError
    ├── AdapterNotFound      no adapter of that name
    ├── AdapterConflict      the name is taken by other weights, or reserved
    ├── InvalidAdapterName   the name cannot be used in a URL or a metric label
    ├── AdapterPathRefused   the path lies outside the directories that the operator allowed
    ├── InvalidAdapter       the files are broken, incomplete or not an adapter at all
    ├── UnsupportedAdapter   a sound adapter of a kind that cannot be served exactly
    └── CoverageError        tensors that do not bind to this base model, or tensors that are missing

Messages name the tensor, key or file and carry the numbers; they never carry file contents.
"""


class AdapterError(Exception):
    """Base of all refusals; the message is meant for the person who sent the adapter."""


class AdapterNotFound(AdapterError):
    def __init__(self, name: str) -> None:
        super().__init__(f"no adapter is named {name!r}")


class AdapterConflict(AdapterError):
    pass


class InvalidAdapterName(AdapterError):
    pass


class AdapterPathRefused(AdapterError):
    pass


class InvalidAdapter(AdapterError):
    pass


class UnsupportedAdapter(AdapterError):
    pass


class CoverageError(AdapterError):
    """Not every tensor of the adapter binds to a module of the base with the right shape.

    `problems` holds one line a tensor; the message shows the first few and the total.
    """

    SHOWN = 8

    def __init__(self, problems: list[str], bound: int) -> None:
        self.problems = problems
        shown = "; ".join(problems[: self.SHOWN])
        more = f"; and {len(problems) - self.SHOWN} more" if len(problems) > self.SHOWN else ""
        super().__init__(f"{len(problems)} of the adapter's tensors do not fit this base ({bound} do): {shown}{more}")
