"""Why an adapter could not be loaded, and whether trying again may help."""

from dataclasses import dataclass


class UnusableAdapter(Exception):
    """As it is, the adapter will never be served. The message is for whoever registered it."""


@dataclass(frozen=True)
class LoadFailure:
    """is_final: the adapter's own bytes are to blame, and will be the next time. Else memory, a disk or a file that is
    not there were in the way, which may pass."""

    reason: str
    is_final: bool


def failure_of(error: BaseException) -> LoadFailure:
    if isinstance(error, OSError):  # its text would show the path
        return LoadFailure(error.strerror or "it cannot be read", is_final=False)
    return LoadFailure(str(error) or type(error).__name__, isinstance(error, UnusableAdapter))
