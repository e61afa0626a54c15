"""Our refusals for other servers' clients: the same reasons, in the shape that those clients read."""

from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

from fastapi import Request, Response
from fastapi.routing import APIRoute

from adapters_store.errors import AdapterError, clean
from server.errors import ADAPTER_STATUS, HeddleError


class Refusal(NamedTuple):
    """`status` is the one that /v1/adapters answers with."""

    status: int
    message: str
    param: str | None = None


def refusal_of(error: AdapterError | HeddleError) -> Refusal:
    if isinstance(error, HeddleError):
        return Refusal(error.status, clean(error.message), error.param and clean(error.param))
    status = next(ADAPTER_STATUS[kind][0] for kind in type(error).__mro__ if kind in ADAPTER_STATUS)
    return Refusal(status, str(error))


def refusing_as(told: Callable[[Request, Refusal], Response]) -> type[APIRoute]:
    """Routes whose refusals are answered as `told` says."""

    class Route(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            answer = super().get_route_handler()

            async def answer_or_refuse(request: Request) -> Response:
                try:
                    return await answer(request)
                except (AdapterError, HeddleError) as error:
                    refusal = refusal_of(error)
                response = told(request, refusal)
                if refusal.status == 503:
                    response.headers["Retry-After"] = "1"
                return response

            return answer_or_refuse

    return Route
