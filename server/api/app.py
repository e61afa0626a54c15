"""The application: routes, error shape and limits, around one Service."""

from fastapi import FastAPI

from server.api import health, openapi
from server.api.catalogue import adapters, aliases, models, store, uploads
from server.api.foreign import dynamo, sglang, vllm
from server.api.generating import chat, completions, embeddings, messages, responses, tokenize
from server.api.service import Service
from server.api.transport import errors
from server.api.transport.cors import open_to
from server.api.transport.limits import RequestLimits
from server.version import VERSION

MODULES = (
    completions, chat, responses, messages, embeddings, tokenize, models, adapters, uploads, aliases, store, health,
    openapi,
    vllm, sglang, dynamo,
)  # fmt: skip


def create_app(service: Service) -> FastAPI:
    app = FastAPI(
        title="Heddle",
        version=VERSION,
        summary="One frozen base model, many LoRA and ESFT adapters decoded in the same batch.",
        redirect_slashes=False,
        openapi_url=None,  # the schema that FastAPI derives promises answers that we do not give: openapi.py has ours
    )
    app.state.service = service
    for module in MODULES:
        app.include_router(module.router)
    errors.install(app)
    max_bytes, max_file_bytes = service.config.max_body_bytes, service.uploads.limits.max_upload_bytes
    app.add_middleware(RequestLimits, max_bytes=max_bytes, max_file_bytes=max_file_bytes)
    open_to(app, service.config.cors_origins)
    return app
