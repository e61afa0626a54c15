"""The application: routes, error shape and limits, around one Service."""

from fastapi import FastAPI

from server.api import adapters, aliases, completions, errors, health, models, store, uploads
from server.api.foreign import dynamo, sglang, vllm
from server.api.limits import RequestLimits
from server.api.service import Service
from server.version import VERSION


def create_app(service: Service) -> FastAPI:
    app = FastAPI(
        title="Heddle",
        version=VERSION,
        summary="One frozen base model, many LoRA and ESFT adapters decoded in the same batch.",
        redirect_slashes=False,
        # the schema that FastAPI derives promises answers that we do not give (422 in its own shape)
        openapi_url=None,
    )
    app.state.service = service
    for module in (completions, models, adapters, uploads, aliases, store, health, vllm, sglang, dynamo):
        app.include_router(module.router)
    errors.install(app)
    max_bytes, max_file_bytes = service.config.max_body_bytes, service.uploads.limits.max_upload_bytes
    app.add_middleware(RequestLimits, max_bytes=max_bytes, max_file_bytes=max_file_bytes)
    return app
