"""Every way in which Heddle says no, and the HTTP status of each. What has none ends the start of the server.

HeddleError
├── ConfigError                a setting or the base model cannot be served; starting again will not help
├── StartupError               the engine did not come up, or the port is taken; starting again may help
├── InvalidRequest        400  a field is missing, malformed, out of range or not served
│   └── ContextExceeded   400  more tokens than the model's context has
├── NotFound              404  an unknown model
├── PayloadTooLarge       413  the body exceeds the limit
├── UnsupportedEncoding   415  the body is compressed
├── TooManyHeaders        431  more headers than are read
├── ClientLeft            499  nobody waits for the answer any more
├── TooManyOfAdapter      429  as many requests of this adapter are under way as its manifest allows
├── AdapterDeleted        404  the adapter was deleted, and the time is up in which its requests could finish
├── EngineDead            503  the engine process has ended; nothing can be generated
├── EngineSilent          503  the engine process lives, and has said nothing for too long
├── ShuttingDown          503  a signal has come; nothing new is taken
├── Overloaded            503  as much is under way as is taken at once
├── GrammarsUnavailable   503  the process that compiles grammars did not start; requests without a grammar are served
├── AdapterUnavailable    503  the adapter could not be brought to the device; that may pass
├── QuarantinedMeanwhile  422  the adapter is in quarantine since the request was taken
├── GrammarFailed         422  what the answer had to spell became too much at some token of it
├── GenerationTimeout     504  the request's own timeout is over
└── GenerationFailed      503  this request failed in the engine; others go on

AdapterError                   adapters_store/errors.py says what each means
├── AdapterNotFound       404
├── AdapterConflict       409
│   └── CatalogFull       409
├── RevisionChanged       412
├── InvalidAdapterName    400
├── InvalidAlias          400
├── InvalidManifest       422
├── AdapterPathRefused    400
├── InvalidAdapter        422
│   ├── GivenUp           422
│   ├── NoAdapterThere    422
│   └── Unforeseen        422
├── UnsupportedAdapter    422
├── CoverageError         422
├── WrongBase             422
├── AdapterQuarantined    422
├── FileNameRefused       400
├── UploadNotFound        404
├── UploadConflict        409
├── UploadTooLarge        413
├── SourceRefused         400
├── SourceNotFound        404
├── SourceFailed          502
├── StoreFailed           503
│   ├── StoreLocked       503
│   └── StoreUnfit        503
└── StoreFull             507
"""

from adapters_store import errors as adapter_errors


class HeddleError(Exception):
    """Base of all our errors. `message` is shown to users; it holds no paths, addresses or others' text."""

    status = 500
    type = "internal_error"
    code: str | None = None
    param: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        if param is not None:
            self.param = param
        if code is not None:
            self.code = code


class ConfigError(HeddleError):
    pass


class StartupError(HeddleError):
    pass


class InvalidRequest(HeddleError):
    status = 400
    type = "invalid_request_error"


class ContextExceeded(InvalidRequest):
    """Clients that then shorten the conversation, or ask a model with a longer context, look for OpenAI's words in the
    message and not at the code: LiteLLM for those of the second half, LangChain for `prompt is too long`."""

    status = 400
    code = "context_length_exceeded"

    def __init__(self, told: str, max_model_len: int, param: str) -> None:
        super().__init__(f"{told}; this model's maximum context length is {max_model_len:,} tokens", param=param)


class NotFound(HeddleError):
    status = 404
    type = "invalid_request_error"


class PayloadTooLarge(HeddleError):
    status = 413
    type = "invalid_request_error"


class UnsupportedEncoding(HeddleError):
    status = 415
    type = "invalid_request_error"


class TooManyHeaders(HeddleError):
    status = 431
    type = "invalid_request_error"
    code = "invalid_http"


class ClientLeft(HeddleError):
    status = 499
    type = "client_left"

    def __init__(self) -> None:
        super().__init__("the client left")


class TooManyOfAdapter(HeddleError):
    status = 429
    type = "rate_limit_error"
    code = "adapter_busy"


class AdapterDeleted(HeddleError):
    status = 404
    type = "invalid_request_error"
    code = "adapter_deleted"


class EngineDead(HeddleError):
    status = 503
    type = "service_unavailable"
    code = "engine_dead"


class EngineSilent(HeddleError):
    status = 503
    type = "service_unavailable"
    code = "engine_silent"


class ShuttingDown(HeddleError):
    status = 503
    type = "service_unavailable"
    code = "shutting_down"

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class Overloaded(HeddleError):
    status = 503
    type = "service_unavailable"
    code = "overloaded"


class GrammarsUnavailable(HeddleError):
    status = 503
    type = "service_unavailable"
    code = "grammars_unavailable"


class AdapterUnavailable(HeddleError):
    status = 503
    type = "service_unavailable"
    code = "adapter_unavailable"


class QuarantinedMeanwhile(HeddleError):
    """What later requests are told by AdapterQuarantined, which the catalogue raises."""

    status = 422
    type = "invalid_request_error"
    code = "adapter_quarantined"


class GrammarFailed(HeddleError):
    status = 422
    type = "invalid_request_error"
    code = "grammar_failed"


class GenerationTimeout(HeddleError):
    status = 504
    type = "timeout"
    code = "timeout"


class GenerationFailed(HeddleError):
    status = 503
    type = "service_unavailable"
    code = "generation_failed"


ADAPTER_STATUS: dict[type[adapter_errors.AdapterError], tuple[int, str]] = {
    adapter_errors.AdapterNotFound: (404, "adapter_not_found"),
    adapter_errors.AdapterConflict: (409, "adapter_conflict"),
    adapter_errors.CatalogFull: (409, "too_many_adapters"),
    adapter_errors.RevisionChanged: (412, "revision_changed"),
    adapter_errors.InvalidAdapterName: (400, "invalid_adapter_name"),
    adapter_errors.InvalidAlias: (400, "invalid_alias"),
    adapter_errors.InvalidManifest: (422, "invalid_manifest"),
    adapter_errors.AdapterPathRefused: (400, "adapter_path_refused"),
    adapter_errors.InvalidAdapter: (422, "invalid_adapter"),
    adapter_errors.UnsupportedAdapter: (422, "unsupported_adapter"),
    adapter_errors.CoverageError: (422, "adapter_does_not_fit"),
    adapter_errors.WrongBase: (422, "wrong_base"),
    adapter_errors.AdapterQuarantined: (422, "adapter_quarantined"),
    adapter_errors.FileNameRefused: (400, "file_name_refused"),
    adapter_errors.UploadNotFound: (404, "upload_not_found"),
    adapter_errors.UploadConflict: (409, "upload_conflict"),
    adapter_errors.UploadTooLarge: (413, "upload_too_large"),
    adapter_errors.SourceRefused: (400, "source_not_allowed"),
    adapter_errors.SourceNotFound: (404, "source_not_found"),
    adapter_errors.SourceFailed: (502, "source_failed"),
    adapter_errors.StoreFull: (507, "store_full"),
    adapter_errors.StoreFailed: (503, "store_failed"),
}
# the `type` of what is not the request's fault; "invalid_request_error" otherwise
ADAPTER_ERROR_TYPE: dict[int, str] = {502: "bad_gateway", 503: "service_unavailable", 507: "insufficient_storage"}
