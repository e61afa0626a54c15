"""What every route needs, passed in once."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import Request

from adapters_store.catalog import Catalog
from adapters_store.errors import AdapterNotFound
from adapters_store.ref import AdapterRef
from adapters_store.verifier import Verifier
from server.api.text import Text
from server.config import ServerConfig
from server.engine.client import EngineClient
from server.engine.messages import EngineInfo
from server.errors import NotFound, Overloaded, ShuttingDown
from server.metrics import Metrics

_LONG_TEXT = 10_000  # characters: about 10 ms to tokenize


@dataclass
class Service:
    config: ServerConfig
    info: EngineInfo
    client: EngineClient
    catalog: Catalog
    verifier: Verifier
    text: Text
    metrics: Metrics
    started: int  # Unix time, seconds
    is_draining: bool = False

    def adapter_for(self, model: str) -> AdapterRef | None:
        """The adapter that this model name means now; None for the base. Raises NotFound."""
        if model == self.catalog.base_name:
            return None
        try:
            return self.catalog.get(model).ref
        except AdapterNotFound:
            raise NotFound(f"the model {model[:128]!r} does not exist", param="model", code="model_not_found") from None

    def is_served(self, model: str) -> bool:
        return model == self.catalog.base_name or any(entry.ref.name == model for entry in self.catalog)

    async def encode(self, text: str, param: str, add_special_tokens: bool = True) -> list[int]:
        """Tokens of a text, without holding up the event loop for a long one."""
        self.text.refuse_if_longer(text, self.info.max_model_len, param)
        if len(text) < _LONG_TEXT:
            return self.text.encode(text, param, add_special_tokens)
        return await asyncio.to_thread(self.text.encode, text, param, add_special_tokens)

    def admit(self, submissions: Sequence[object]) -> None:
        """Refuse work that could only pile up."""
        if self.is_draining:
            raise ShuttingDown
        limit = self.config.max_concurrent_requests
        if self.client.num_requests + len(submissions) > limit:
            raise Overloaded(f"{self.client.num_requests} completions are under way; at most {limit} are taken at once")


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service
