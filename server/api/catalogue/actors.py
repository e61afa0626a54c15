"""Who asks, for the log of changes."""

from fastapi import Request


def actor_of(request: Request) -> str:
    """The client's address: there are no users yet that could be told apart."""
    return request.client.host if request.client is not None else "unknown"
