"""The routes of the application, one by one."""

from collections.abc import Iterable, Iterator

from fastapi.routing import APIRoute
from starlette.routing import BaseRoute


def single(routes: Iterable[BaseRoute]) -> Iterator[BaseRoute]:
    """All of them, those of routers too: FastAPI keeps a router that was included as one entry."""
    for route in routes:
        router = getattr(route, "original_router", None)
        if router is None:
            yield route
        else:
            yield from single(router.routes)


def api_routes(routes: Iterable[BaseRoute]) -> Iterator[APIRoute]:
    """Raises KeyError for one that could not say what it takes and answers."""
    for route in single(routes):
        if not isinstance(route, APIRoute):
            raise KeyError(f"{route!r} is no route that could say what it takes and answers")
        yield route


def methods_of(path: str, routes: Iterable[BaseRoute]) -> list[str]:
    """Those that the path takes, whichever routes they belong to; of the routes that have it word for word, if any."""
    there = [route for route in api_routes(routes) if route.path_regex.match(path)]
    exact = [route for route in there if route.path == path]
    return sorted({method for route in exact or there for method in route.methods or ()})
