"""For pages in browsers: which origins may ask, and which headers of an answer their scripts may read."""

from collections.abc import Collection

from fastapi import FastAPI, Request
from starlette.middleware.cors import CORSMiddleware

from server.api.service import service_of
from server.errors import InvalidRequest

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
# the headers of our answers that a browser would keep from a script
READ_BY_CLIENTS = ("Retry-After", "Upload-Offset", "request-id", "x-should-retry")


def open_to(app: FastAPI, origins: Collection[str]) -> None:
    """Let pages of these origins ask. `*`: pages of all.

    Around all else that the application has, the last resort for errors too: a refusal without these headers is for
    a script no answer at all. Never with credentials: there are none here that a browser would add by itself.
    """
    if origins:
        app.middleware_stack = CORSMiddleware(
            app.build_middleware_stack(),
            allow_origins=origins,
            allow_methods=METHODS,
            allow_headers=("*",),  # OpenAI's clients send a dozen of their own
            expose_headers=READ_BY_CLIENTS,
            allow_private_network=True,  # a public page that was named may ask a server on the loopback: it was named
        )


def refuse_other_sites(request: Request) -> None:
    """A page that somebody visits can make their browser send a form, or a request without a body, to any server that
    the browser reaches, and nobody is asked; browsers do say so. Pages that the operator has named may."""
    origins, origin = service_of(request).config.cors_origins, request.headers.get("origin")
    is_other = request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
    if is_other and not (origin is not None and ("*" in origins or origin in origins)):
        raise InvalidRequest("pages of other sites may not send this", code="cross_site")
