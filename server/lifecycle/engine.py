"""What is asked of the engine when adapters come and go."""

from collections.abc import Awaitable
from typing import Protocol

from adapters_store.ref import AdapterRef
from server.engine.messages import AdapterChecked


class Engine(Protocol):
    """server/engine/client.py says what each means."""

    def add_adapter(self, ref: AdapterRef) -> None: ...

    def remove_adapter(self, ref: AdapterRef) -> Awaitable[int]: ...

    def is_given_up(self, ref: AdapterRef) -> bool: ...

    async def check_adapter(self, ref: AdapterRef, num_tokens: int) -> AdapterChecked: ...
