"""With what exit status a command ends. docs/operations.md tells supervisors and scripts the same."""

from adapters_store.errors import AdapterError, BaseUnreadable, StoreFailed, StoreFull
from server.errors import ConfigError, HeddleError

EXIT_REFUSED = 1  # an adapter was refused, found damaged or not found
EXIT_FAILED = 70  # EX_SOFTWARE: the engine died or never came up, or no server answers; trying again may help
EXIT_CONFIG = 78  # EX_CONFIG: a setting, a model or a store that cannot be used; trying again will not help
EXIT_STOPPED_EARLY = 130  # as a shell reports Ctrl-C: a signal came before there was anything to end in good order


class Failed(Exception):
    """A command cannot go on, for a reason that has no error of its own."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


FORESEEN = (HeddleError, AdapterError, BaseUnreadable, Failed)


def status_of(error: HeddleError | AdapterError | BaseUnreadable | Failed) -> int:
    if isinstance(error, Failed):
        return error.status
    if isinstance(error, ConfigError | BaseUnreadable | StoreFailed | StoreFull):
        return EXIT_CONFIG
    return EXIT_REFUSED if isinstance(error, AdapterError) else EXIT_FAILED
